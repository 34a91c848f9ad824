//! Every bound on a queue, body, cache or wait, with the reason for its size.

use std::time::Duration;

// Wire: what a peer may announce.

/// Longest database name taken from a peer, in bytes: a file name on Linux cannot be longer.
pub const PEER_NAME_BYTES_MAX: usize = 255;
/// Most pages by which an LTX file lets the database grow without holding them: SQLite writes no page that it took and
/// gave back within a transaction. Each costs 8 bytes of memory.
pub const UNSENT_PAGES_MAX: usize = 1 << 20;
/// Longest lease id taken from a peer, in bytes: Consul's are 36; leaves room for other leasers.
pub const LEASE_ID_BYTES_MAX: usize = 256;
/// Most entries of a position map: far above what one mount can hold open, and 18 MB at the most.
pub const POSITION_MAP_ENTRIES_MAX: usize = 65_536;
/// Largest position map in bytes: its count, then a name length, a name, a TXID and a checksum each.
pub const POSITION_MAP_BYTES_MAX: usize =
    4 + POSITION_MAP_ENTRIES_MAX * (4 + PEER_NAME_BYTES_MAX + 8 + 8);

// HTTP: waits. Nothing a peer does or leaves undone may hold a task or a file for ever.

/// Time to open a connection to a peer: some lost packets, not a dead host.
pub const CONNECT_WAIT: Duration = Duration::from_secs(5);
/// Time until a peer answers a request with its headers; all but the forwarded ones, exports and imports
/// answer at once.
pub const RESPONSE_WAIT: Duration = Duration::from_secs(15);
/// Time between two requests, or until the first one, on a connection to us.
pub const REQUEST_WAIT: Duration = Duration::from_secs(30);
/// Time to send the whole of a small request body, such as a position map.
pub const SMALL_BODY_WAIT: Duration = Duration::from_secs(30);
/// Longest time in which a peer takes or sends nothing of a body. A LiteFS replica reads nothing
/// while it waits for local readers, so this is long; a dead host is found by [`PING_WAIT`].
pub const BODY_STALL_WAIT: Duration = Duration::from_secs(300);
/// Period of HTTP/2 pings.
pub const PING_PERIOD: Duration = Duration::from_secs(2);
/// Time for the answer to an HTTP/2 ping: above any pause of a live host.
pub const PING_WAIT: Duration = Duration::from_secs(5);
/// Time until the host at the other end of a silent connection counts as dead.
pub const DEAD_HOST_WAIT: Duration = Duration::from_secs(30);
/// Period of new connections to a former primary that still owes an answer, to see whether its host is alive.
pub const DEAD_HOST_PERIOD: Duration = Duration::from_secs(5);
/// How long a node that has become primary waits for the former one's answer to what it had passed on: that host may be
/// alive and the program on it hang.
pub const FORMER_PRIMARY_WAIT: Duration = Duration::from_secs(120);
/// Period of heartbeats on an idle stream, fixed by the protocol.
pub const HEARTBEAT_PERIOD: Duration = Duration::from_secs(1);
/// Silence on an idle stream that means a dead primary: five heartbeats.
pub const HEARTBEAT_WAIT: Duration = Duration::from_secs(5);
/// Silence before the ready frame or within an LTX file, when a LiteFS primary that waits for its
/// writers sends no heartbeats; pings still find a dead host at once.
pub const SNAPSHOT_WAIT: Duration = Duration::from_secs(60);

// HTTP: sizes.

/// Largest document (`/info`, `/status`, an error text) taken from a peer, in bytes: room for the
/// status of ten thousand databases.
pub const DOCUMENT_BYTES_MAX: usize = 4 << 20;
/// Largest request or response head in bytes: ours are some hundred.
pub const HEAD_BYTES_MAX: u32 = 16 << 10;
/// Buffer for the head of an HTTP/1.1 request, in bytes; a larger one is refused.
pub const HTTP1_BUFFER_BYTES: usize = 64 << 10;
/// HTTP/2 window of one body in bytes: 10 Gbit/s over 6 ms, or 1 Gbit/s over 60 ms.
pub const STREAM_WINDOW: u32 = 8 << 20;
/// HTTP/2 window of a connection in bytes: two bodies at full speed.
pub const CONNECTION_WINDOW: u32 = 16 << 20;
/// Largest HTTP/2 frame in bytes: few enough frames for a gigabyte a second, and a bound on what a
/// queue of frames holds.
pub const HTTP2_FRAME_BYTES_MAX: u32 = 256 << 10;
/// One piece of a body that we send, in bytes; as large as one HTTP/2 frame.
pub const BODY_PIECE_BYTES: usize = HTTP2_FRAME_BYTES_MAX as usize;
/// Pieces of a body between the task that makes it and the connection: 1 MiB, so that both work.
pub const BODY_QUEUE_PIECES: usize = 4;

/// Memory between the maker of a snapshot and a slower peer, in bytes; what exceeds it goes to disk.
pub const SPOOL_MEMORY_BYTES: usize = 8 << 20;
/// Snapshots and exports made at a time, and exports that are made or wait on the disk: more would only compete for it.
pub const SPOOLS_MAX: usize = 4;
/// How long an export that was made counts while a slow peer takes it: all others wait meanwhile.
pub const SPOOL_DRAIN_WAIT: Duration = Duration::from_secs(600);
/// Uploads on the disk at a time; imports go one by one, so that more would only wait there.
pub const UPLOADS_MAX: usize = 4;
/// How long one more waits for one of them to end; a client gives up on a body that nobody takes later
/// ([`BODY_STALL_WAIT`]).
pub const UPLOAD_WAIT: Duration = Duration::from_secs(60);
/// With less room than this on the disk nothing more is stored for a peer: far enough above [`FREE_SPACE_MIN`] that
/// it keeps no writer out.
pub const PEER_FREE_SPACE_MIN: u64 = 4 * FREE_SPACE_MIN;
/// Connections to the API at a time, at the most: each costs a descriptor and some kilobytes.
pub const CONNECTIONS_MAX: usize = 1024;
/// Connections to the API, or to the proxy, where descriptors are few.
pub const CONNECTIONS_MIN: usize = 64;
/// Requests on one HTTP/2 connection at a time: our client has one.
pub const REQUESTS_PER_CONNECTION_MAX: u32 = 100;
/// Events that wait for one slow reader of `/events`; then its connection is closed (protocol).
pub const EVENT_QUEUE_MAX: usize = 1024;
/// Time that open requests get to end when the node stops: half of what service managers grant.
pub const HTTP_STOP_WAIT: Duration = Duration::from_secs(5);

// The replication stream.

/// Time in which a stream sends its last changes when the node stops; below
/// [`HTTP_STOP_WAIT`], after which it is cut off.
pub const STREAM_END_WAIT: Duration = Duration::from_secs(4);
/// Two changes closer than this are "quickly", and the stream pauses for [`STREAM_PAUSE`].
pub const STREAM_QUICK: Duration = Duration::from_millis(5);
/// Pause of a stream between two rounds while changes come quickly: a thousand wake-ups a second at
/// the most, whatever the commit rate.
pub const STREAM_PAUSE: Duration = Duration::from_millis(1);
/// Time until a stream tries a database again that could not be read.
pub const STREAM_RETRY: Duration = Duration::from_secs(10);

// The HALT lock.

/// How long a HALT lock is valid unless it is renewed (protocol).
pub const HALT_TTL: Duration = Duration::from_secs(30);
/// How often its holder renews it: twice may fail.
pub const HALT_RENEWAL: Duration = Duration::from_secs(10);
/// Time until a HALT lock is granted, all in all (protocol).
pub const HALT_WAIT: Duration = Duration::from_secs(10);
/// Requests that wait for a HALT lock at a time: each holds a thread.
pub const HALT_WAITERS_MAX: usize = 16;
/// Time in which a forwarded transaction is taken by the primary, retries included. The application
/// waits in a system call meanwhile.
pub const FORWARD_WAIT: Duration = Duration::from_secs(10);
/// Time in which the primary may wait for its readers to apply a forwarded transaction.
pub const FORWARD_LOCK_WAIT: Duration = Duration::from_secs(8);
/// First pause before a forwarded transaction is sent again; it doubles.
pub const FORWARD_RETRY: Duration = Duration::from_millis(20);
/// Forwarded transactions that arrive at a time.
pub const FORWARDS_MAX: usize = 4;
/// Positions of forwarded transactions that a replica remembers, until the primary has sent them: 128
/// KiB a database at the most. One that it has forgotten costs a new connection.
pub const TAKEN_LEN: usize = 8192;
/// Time in which HALT locks are given back when the node stops; they would expire anyway.
pub const HALT_STOP_WAIT: Duration = Duration::from_secs(3);

// Following a primary.

/// Events between the network and the thread that stores them, each of at most one chunk: 16 MiB.
pub const REPLICA_QUEUE_EVENTS: usize = 256;
/// Time until a replica reconnects for a database that failed here, such as for lack of space.
pub const REPLICA_RETRY: Duration = Duration::from_secs(30);

// Commands that wait for a node.

/// Time until a node that was asked to become primary is: an election takes the lease's time.
pub const PROMOTE_WAIT: Duration = Duration::from_secs(30);
/// Between two attempts to become primary at start-up.
pub const PROMOTE_RETRY: Duration = Duration::from_millis(500);
/// Longest silence of a stream of events, which has no heartbeat; who waits for one waits shorter.
pub const EVENTS_WAIT: Duration = Duration::from_secs(3600);

// The proxy.

/// How long a client is taken to have seen its last transaction, `Expires` of the cookie (LiteFS's).
pub const TXID_COOKIE_LIFE: Duration = Duration::from_secs(300);
/// How long a read waits for the transaction that its client has seen (LiteFS's).
pub const TXID_WAIT: Duration = Duration::from_secs(5);
/// How long of that it waits here before the primary is asked: far above any usual lag.
pub const READ_HERE_WAIT: Duration = Duration::from_secs(1);
/// How long a request waits for an application that refuses connections: it may be starting.
pub const APPLICATION_WAIT: Duration = Duration::from_secs(30);
/// Pause between two attempts to connect to it; nothing else would tell that it listens.
pub const APPLICATION_RETRY: Duration = Duration::from_millis(100);
/// How long a body is held back whose client waits to be asked for it (LiteFS's).
pub const CONTINUE_WAIT: Duration = Duration::from_secs(1);
/// How long a connection to the application is kept without a request (LiteFS's).
pub const PROXY_IDLE_LIFE: Duration = Duration::from_secs(90);
/// Such connections: enough for as many requests at a time without opening a new one for each.
pub const PROXY_IDLE_CONNECTIONS_MAX: usize = 512;
/// New connections that may be closed unused in a row before a request is given up.
pub const PROXY_SEND_ATTEMPTS: u32 = 3;
/// Connections of clients at a time, at the most: each costs two descriptors and some buffers.
pub const PROXY_CONNECTIONS_MAX: usize = 16_384;
/// Pause after a connection that could not be taken, most likely for lack of descriptors.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Headers of a message.
pub const PROXY_HEADERS_MAX: usize = 256;
/// Head of a message in bytes: some applications have tens of kilobytes of cookies.
pub const PROXY_HEAD_BYTES_MAX: usize = 64 << 10;
/// Buffer of a connection, in bytes: enough for a gigabyte a second.
pub const PROXY_BUFFER_BYTES: usize = 128 << 10;
/// Nodes that a request may pass: one too many for any change of primary.
pub const PROXY_HOPS_MAX: usize = 4;

// The supervised process.

/// Time from the second request to end until a supervised process is killed: for one that is
/// writing its last lines, not for one that hangs.
pub const CHILD_GRACE: Duration = Duration::from_secs(5);

// The engine.

/// Transactions that may wait for the LTX writer. A commit needs some 200 bytes here; the writer
/// merges them, so this is reached only when the disk stands still.
pub const CHAIN_QUEUE_LEN: usize = 100_000;

/// Bytes of LTX files that may wait for the LTX writer: some seconds of a slow disk.
pub const CHAIN_QUEUE_BYTES: usize = 1 << 30;

/// Transactions in one LTX file: a replica that missed one of them fetches them all again. And of so
/// many the positions inside are known, 8 bytes each.
pub const LTX_BATCH_LEN: usize = 1024;

/// Bytes of transactions in one merged LTX file, so that one file never holds up the stream.
pub const LTX_BATCH_BYTES: usize = 8 << 20;

/// How long the LTX writer rests after a round: the commits of that time go into one file. Each file
/// costs an inode for as long as it is kept, and a sync at the next checkpoint, so that ten a second
/// are the most; streams read what is in memory, and who waits for durability wakes the writer.
pub const WRITER_REST: Duration = Duration::from_millis(100);

/// Transactions kept for the streams: one second of a busy database.
pub const RECENT_LEN: usize = 8192;

/// Bytes of the transactions kept for the streams, of one database.
pub const RECENT_BYTES: usize = 8 << 20;

/// Bytes of the transactions kept for the streams, of all databases. Above it a database keeps its last one
/// only; a stream that is behind reads files.
pub const RECENT_BYTES_OF_ALL: usize = 64 << 20;

/// The buffer of a sequential read or write of a file.
pub const IO_BUFFER: usize = 1 << 20;

/// How long an internal operation (snapshot, export, import) waits for locks of the application.
pub const LOCK_WAIT: Duration = Duration::from_secs(30);

/// How long a lock call that does not wait is kept while the engine itself is in the way: not longer than a
/// request may be unanswered before the log names it.
pub const ENGINE_LOCK_WAIT: Duration = Duration::from_secs(4);

/// How long a node that stops being primary waits for applications that hold a write lock: for a
/// transaction that is being written, not for one that a person is typing. Another node may be
/// primary already.
pub const DEMOTION_WAIT: Duration = Duration::from_secs(1);

/// How long readers are left alone after the applier locked some of them out: SQLite's busy handler
/// tries again every 100 ms.
pub const READERS_TURN: Duration = Duration::from_millis(120);

/// How long the applier locks readers out at a time, as long as one transaction does not take longer.
pub const EXCLUSIVE_HOLD: Duration = Duration::from_millis(50);

/// A transaction up to this size is encoded in memory, so that streams need not read its file.
pub const ENCODE_IN_MEMORY: usize = 4 << 20;

/// A received LTX file up to this size is held in memory; a larger one goes to a file.
pub const RECEIVE_IN_MEMORY: usize = 1 << 20;

/// Bytes of received LTX files that may wait to be applied to one database.
pub const INBOX_BYTES: usize = 64 << 20;

/// With less room than this on the disk no transaction is begun: its WAL frames might still fit, but
/// not its LTX file.
pub const FREE_SPACE_MIN: u64 = 4 << 20;

/// A replica checkpoints a WAL that has grown by so many frames: SQLite's own default.
pub const CHECKPOINT_FRAMES: u32 = 1000;

/// Written LTX files that may wait for a sync, and how many are open at once while they are synced.
pub const SYNC_FILES: usize = 256;

/// Pages in written LTX files that may wait for a sync: 24 bytes of memory each, for as long as the
/// application does not checkpoint.
pub const SYNC_PAGES: usize = 128 << 10;

/// How long the LTX writer waits after a failure before it tries again.
pub const WRITER_RETRY: Duration = Duration::from_secs(1);

/// What a buffer keeps between uses, for each of many databases.
pub const IDLE_BUFFER: usize = 64 << 10;

// Consul.

/// Time until Consul answers a call that does not wait for something: some lost packets, and an
/// election among its servers takes longer anyway.
pub const CONSUL_WAIT: Duration = Duration::from_secs(2);
/// How long an unused connection to Consul is kept: less than its own limit.
pub const CONSUL_IDLE: Duration = Duration::from_secs(60);
/// How long one look at the lease key waits for a change.
pub const CONSUL_WATCH: Duration = Duration::from_secs(60);
/// Positions of databases in the record beside the lease: some 20 KB; the rest is in its digest.
pub const RECORD_DATABASES_MAX: usize = 256;
/// How long a candidate that lacks transactions of the last primary waits for one that has them: the
/// time in which a primary that was killed is back.
pub const ELECTION_RECORD_WAIT: Duration = Duration::from_secs(5);
/// How long a candidate waits for another one that is further and there, but does not take the lease.
pub const ELECTION_RIVAL_WAIT: Duration = Duration::from_secs(20);

/// Time that programs get to close the files of a mount that is to go.
pub const UNMOUNT_BUSY_WAIT: Duration = Duration::from_millis(500);

// Handing the lease over.

/// Transactions by which a replica may be behind when writes are paused for it: some milliseconds.
pub const HANDOFF_LAG: u64 = 1000;
/// Time in which a replica comes that near, while writes go on.
pub const HANDOFF_CATCH_UP_WAIT: Duration = Duration::from_secs(5);
/// Time in which the write transactions that have begun must end.
pub const HANDOFF_DRAIN_WAIT: Duration = Duration::from_secs(2);
/// Time in which the target must take the lease; nobody writes meanwhile.
pub const HANDOFF_TAKE_WAIT: Duration = Duration::from_secs(3);
/// Time until the answer to a request to hand the lease over: all of the above and some calls.
pub const HANDOFF_ANSWER_WAIT: Duration = Duration::from_secs(20);
/// Time in which a target applies what it has received, before it takes the lease.
pub const HANDOFF_APPLY_WAIT: Duration = Duration::from_secs(2);

// Backups.

/// LTX files that are merged into one upload: as many as LiteFS sends at a time, and each is open.
pub const BACKUP_FILES: usize = 256;
/// Bytes of files in one upload, so that one that breaks off does not cost much.
pub const BACKUP_BYTES: u64 = 64 << 20;
/// Buffer for each of the files that are merged.
pub const MERGE_BUFFER: usize = 64 << 10;
/// The longest pause after a backup could not be reached.
pub const BACKUP_PAUSE_MAX: Duration = Duration::from_secs(30);
/// How long a backup may take to answer, once it was sent everything: it may verify a large file.
pub const BACKUP_ANSWER_WAIT: Duration = Duration::from_secs(120);
/// How long a stopping primary brings its backup up to date.
pub const BACKUP_END_WAIT: Duration = Duration::from_secs(10);
/// Pause after the backup was refused something for want of a lease, or stood elsewhere.
pub const BACKUP_RETRY: Duration = Duration::from_secs(1);
