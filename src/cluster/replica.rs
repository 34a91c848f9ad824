//! Following a primary: one connection, from the position map to the end of the stream.
//!
//! ```text
//! socket -> decoder (async) -> queue of events -> worker thread -> engine (verify, store) -> apply
//! ```
//!
//! Three stages run at a time: the network fills the queue, the worker checks and stores one file,
//! and the engine applies the one before. Invariants: the worker is over before this returns, so that
//! nothing of a primary arrives after the node has left it; a file that does not verify or does not
//! follow ends the connection, and the next position map has the primary send what is needed; a
//! database that fails for a local reason does not stop the others.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ltx::{HEADER_SIZE, Header, Pos};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;

use super::lineage::{Connection, Lineage, Source};
use super::lookout::View;
use super::peers::Identity;
use crate::engine::{self, ClusterId, DbName, Engine, PrimaryInfo, chain_text};
use crate::http::client::{self, Client, Stream, StreamRequest};
use crate::http::frame::{Event, Frame};
use crate::http::proxy::Link;
use crate::http::security::Security;
use crate::http::{Stop, stopped};
use crate::limits;

mod reached;

use reached::Awaited;
pub(super) use reached::wait_applied;

/// Why following ended before its time.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The primary cannot be reached, or the stream broke.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The advertised primary is this node.
    #[error("cannot connect to self")]
    Myself,
    /// The primary says a cluster id that is none.
    #[error("invalid cluster id: {0:?}")]
    InvalidClusterId(String),
    /// The primary belongs to another cluster.
    #[error("cluster id mismatch: primary has {theirs:?}, this node {ours:?}")]
    OtherCluster {
        /// The primary's id; empty if it has none.
        theirs: String,
        /// Our id; empty if we have none.
        ours: String,
    },
    /// The cluster id could not be stored.
    #[error("store cluster id")]
    Store(#[source] engine::Error),
    /// What the primary sent for a database cannot be used.
    #[error("receive ltx for {db}")]
    Receive {
        /// The database.
        db: DbName,
        /// Why.
        source: engine::Error,
    },
    /// Databases that failed here are tried again over a new connection.
    #[error("reconnecting for databases that failed here")]
    Retry,
    /// A database does not fit what the primary sends; its position is zero now.
    #[error("reconnecting for a snapshot")]
    Snapshot,
    /// The worker died.
    #[error("replica worker failed")]
    Thread(#[from] tokio::task::JoinError),
}

impl Error {
    /// Whether nobody listens at the primary's address: its process is gone.
    pub(super) fn is_port_closed(&self) -> bool {
        match self {
            Error::Client(client::Error::Connect { source, .. }) => {
                source.kind() == io::ErrorKind::ConnectionRefused
            }
            _ => false,
        }
    }
}

/// How following ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The primary ended the stream.
    Closed,
    /// The primary gave its lease to this node.
    Handoff {
        /// The lease to take over.
        lease_id: String,
    },
    /// This node stops.
    Stopped,
    /// Another node has the lease.
    Superseded,
}

/// One connection to a primary.
pub(super) struct Replica<'a> {
    pub(super) engine: &'a Arc<Engine>,
    pub(super) identity: &'a Identity,
    /// What the primary is shown.
    pub(super) security: &'a Security,
    pub(super) primary: &'a PrimaryInfo,
    /// Who has the lease.
    pub(super) view: View,
    /// Whose databases this node has had in full.
    pub(super) lineage: &'a Arc<Lineage>,
    /// The only databases wanted; empty for all.
    pub(super) databases: &'a [String],
    pub(super) ready: &'a watch::Sender<bool>,
    /// Who the primary says it is, while the stream is open.
    pub(super) link: &'a watch::Sender<Option<Link>>,
    /// Notified when a database needs a snapshot.
    pub(super) reconnect: &'a Notify,
    /// How far this connection came.
    pub(super) progress: &'a Progress,
}

/// How far a connection came.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress {
    connected: Arc<AtomicBool>,
    ready: Arc<AtomicBool>,
}

impl Progress {
    /// The primary has begun its stream.
    pub(super) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// The primary has sent everything that it had.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
}

impl Replica<'_> {
    /// Connects and follows until the stream ends, another node has the lease, or `stop`.
    pub(super) async fn run(&self, stop: &mut Stop) -> Result<End, Error> {
        let mut view = self.view.clone();
        let stream = tokio::select! {
            stream = self.connect() => stream?,
            () = stopped(stop) => return Ok(End::Stopped),
            // Who does not answer yet may never do so.
            () = view.not(self.primary) => return Ok(End::Superseded),
        };
        self.progress.connected.store(true, Ordering::Relaxed);
        let source = Source::of(&stream);
        let connection = self.lineage.connect(source);
        // A static primary is always the same node.
        self.engine.shared().set_same_line(view.is_static() || self.lineage.is(source));
        let open = Open::new(self.link, &stream);
        let (queue, events) = mpsc::channel(limits::REPLICA_QUEUE_EVENTS);
        let abandoned = Arc::new(AtomicBool::new(false));
        let (failing, mut has_failed) = watch::channel(BTreeSet::new());
        self.engine.stream_began();
        let worker = Worker {
            engine: self.engine.clone(),
            events,
            abandoned: abandoned.clone(),
            ready: self.ready.clone(),
            lineage: self.lineage.clone(),
            connection,
            databases: self.databases.to_vec(),
            progress: self.progress.clone(),
            current: Current::Nothing,
            is_ready: false,
            failed: BTreeSet::new(),
            failing,
        };
        let worker = spawn_blocking(move || worker.run());
        let pumped = tokio::select! {
            pumped = pump(stream, queue) => pumped,
            () = stopped(stop) => {
                abandoned.store(true, Ordering::Relaxed);
                worker.await??;
                return Ok(End::Stopped);
            }
            () = view.other_than(self.primary) => {
                abandoned.store(true, Ordering::Relaxed);
                worker.await??;
                return Ok(End::Superseded);
            }
            () = retry_due(&mut has_failed) => Err(Error::Retry),
            () = self.reconnect.notified() => Err(Error::Snapshot),
        };
        drop(open);
        // The worker's error comes first: it is why the pump could not go on.
        let end = worker.await??;
        pumped.map(|()| end)
    }

    async fn connect(&self) -> Result<Stream, Error> {
        let client = Client::new(&self.primary.advertise_url, self.security)?;
        let positions = self.engine.positions();
        let positions: Vec<(&str, Pos)> =
            positions.iter().map(|(name, pos)| (name.as_str(), *pos)).collect();
        let (identity, filter) = (self.identity, self.databases);
        let request = StreamRequest { identity, positions: &positions, filter };
        let stream = client.stream(request).await?;
        if stream.node_id == Some(identity.node_id) {
            return Err(Error::Myself);
        }
        self.join_cluster(stream.cluster_id.as_deref()).await?;
        for (name, pos) in positions.into_iter().filter(|(name, _)| stream.contradicts(name)) {
            if let Some(db) = self.engine.database(name) {
                db.set_contradicted(pos);
            }
        }
        Ok(stream)
    }

    /// Takes the cluster's id if there is none here, and makes sure that it is the same.
    async fn join_cluster(&self, theirs: Option<&str>) -> Result<(), Error> {
        let parse = |id: &str| ClusterId::new(id).ok_or(Error::InvalidClusterId(id.to_owned()));
        let theirs = theirs.filter(|id| !id.is_empty()).map(parse).transpose()?;
        match (theirs, self.engine.cluster_id()) {
            (None, None) => Ok(()),
            (Some(theirs), None) => {
                let engine = self.engine.clone();
                let set = spawn_blocking(move || engine.set_cluster_id(&theirs));
                set.await?.map_err(Error::Store)
            }
            (Some(theirs), Some(ours)) if theirs == ours => Ok(()),
            (theirs, ours) => {
                let text = |id: Option<ClusterId>| id.map(|id| id.to_string()).unwrap_or_default();
                Err(Error::OtherCluster { theirs: text(theirs), ours: text(ours) })
            }
        }
    }
}

/// Says that the stream is open, for as long as it is kept.
struct Open<'a>(&'a watch::Sender<Option<Link>>);

impl<'a> Open<'a> {
    fn new(link: &'a watch::Sender<Option<Link>>, stream: &Stream) -> Open<'a> {
        let (node_id, proxy_url) = (stream.node_id, stream.proxy_url.clone());
        link.send_replace(Some(Link { node_id, proxy_url }));
        Open(link)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

/// Moves events from the stream to the worker until either ends.
async fn pump(mut stream: Stream, queue: mpsc::Sender<Event>) -> Result<(), Error> {
    loop {
        let event = tokio::select! {
            event = stream.next() => event?,
            () = queue.closed() => return Ok(()), // The worker has ended and says why.
        };
        let Some(event) = event else { return Ok(()) };
        if queue.send(event).await.is_err() {
            return Ok(());
        }
    }
}

/// Waits until a database has failed here, and then [`limits::REPLICA_RETRY`].
async fn retry_due(has_failed: &mut watch::Receiver<BTreeSet<String>>) {
    if has_failed.wait_for(|failed| !failed.is_empty()).await.is_err() {
        return std::future::pending().await; // the worker has ended
    }
    sleep(limits::REPLICA_RETRY).await;
}

/// Takes the events to the engine; blocking.
struct Worker {
    engine: Arc<Engine>,
    events: mpsc::Receiver<Event>,
    /// Nobody wants the rest of the queue.
    abandoned: Arc<AtomicBool>,
    ready: watch::Sender<bool>,
    lineage: Arc<Lineage>,
    connection: Connection,
    /// The only databases wanted; empty for all.
    databases: Vec<String>,
    progress: Progress,
    current: Current,
    /// The ready frame has come.
    is_ready: bool,
    /// Databases that failed here: their files are of no use without the one that was lost.
    failed: BTreeSet<String>,
    /// The databases of which a file could not be stored.
    failing: watch::Sender<BTreeSet<String>>,
}

/// The LTX file that is arriving.
enum Current {
    Nothing,
    Receiving(Box<Arrival>),
    Skipping,
}

/// An LTX file of which a part is here.
struct Arrival {
    db: DbName,
    receiver: engine::Receiver,
    /// The first bytes, as far as they are here.
    header: [u8; HEADER_SIZE],
    header_len: usize,
}

impl Arrival {
    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        let head = data.len().min(HEADER_SIZE - self.header_len);
        self.header[self.header_len..self.header_len + head].copy_from_slice(&data[..head]);
        self.header_len += head;
        self.receiver.write_all(data)
    }

    /// When the transaction was made, in milliseconds since 1970, of a file that verified.
    fn timestamp_ms(header: &[u8; HEADER_SIZE]) -> Option<i64> {
        Header::decode(header).ok().map(|header| header.timestamp_ms)
    }
}

impl Worker {
    fn run(mut self) -> Result<End, Error> {
        while let Some(event) = self.events.blocking_recv() {
            if self.abandoned.load(Ordering::Relaxed) {
                return Ok(End::Closed);
            }
            if let Some(end) = self.take(event)? {
                return Ok(end);
            }
        }
        Ok(End::Closed)
    }

    fn take(&mut self, event: Event) -> Result<Option<End>, Error> {
        match event {
            Event::Frame(Frame::Ltx { name }) => self.begin(&name)?,
            Event::LtxData(data) => self.data(&data)?,
            Event::LtxEnd => self.finish()?,
            Event::Frame(Frame::Ready) => {
                self.is_ready = true;
                self.lineage.ready();
                self.progress.ready.store(true, Ordering::Relaxed);
                self.announce_ready();
            }
            Event::Frame(Frame::End) => return Ok(Some(End::Closed)),
            Event::Frame(Frame::Handoff { lease_id }) => {
                return Ok(Some(End::Handoff { lease_id }));
            }
            Event::Frame(Frame::Hwm { name, txid }) => {
                if let Some(db) = self.engine.database(&name) {
                    self.engine.set_hwm(db.name(), txid);
                }
            }
            Event::Frame(Frame::Heartbeat { timestamp_ms }) => self.engine.heartbeat(timestamp_ms),
            Event::Frame(Frame::DropDb { name }) => {
                tracing::debug!(db = name, "the primary does not have it; kept here");
                if let Some(db) = self.engine.database(&name) {
                    db.set_unknown();
                }
                self.lineage.set_foreign(name);
            }
        }
        Ok(None)
    }

    fn begin(&mut self, name: &str) -> Result<(), Error> {
        self.current = Current::Skipping;
        if self.failed.contains(name) {
            return Ok(());
        }
        let db = match DbName::new(name) {
            Ok(db) => db,
            Err(error) => {
                tracing::warn!(%error, "left out what the primary sends");
                self.failed.insert(name.to_owned());
                return Ok(());
            }
        };
        self.lineage.set_known(name);
        match self.engine.receive(&db) {
            Ok(receiver) => {
                let arrival = Arrival { db, receiver, header: [0; HEADER_SIZE], header_len: 0 };
                self.current = Current::Receiving(Box::new(arrival));
            }
            Err(error) => self.fail(db, error)?,
        }
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), Error> {
        let Current::Receiving(arrival) = &mut self.current else { return Ok(()) };
        let Err(source) = arrival.write(data) else { return Ok(()) };
        let db = arrival.db.clone();
        self.current = Current::Skipping;
        let path = self.engine.data_dir().to_owned();
        self.fail(db, engine::Error::Io { what: "store received ltx below", path, source })
    }

    fn finish(&mut self) -> Result<(), Error> {
        let current = std::mem::replace(&mut self.current, Current::Nothing);
        let Current::Receiving(arrival) = current else { return Ok(()) };
        let Arrival { db, receiver, header, .. } = *arrival;
        if let Err(error) = receiver.finish() {
            return self.fail(db, error);
        }
        // Under constant writes LiteFS sends no heartbeats; before ready, this is old news.
        if self.is_ready
            && let Some(timestamp_ms) = Arrival::timestamp_ms(&header)
        {
            self.engine.news(timestamp_ms);
        }
        Ok(())
    }

    /// What the primary sent is wrong: that ends the connection. What this node cannot do is for
    /// one database only.
    fn fail(&mut self, db: DbName, error: engine::Error) -> Result<(), Error> {
        if is_from_peer(&error) {
            return Err(Error::Receive { db, source: error });
        }
        tracing::warn!(%db, error = chain_text(&error), "not replicated for now");
        self.failed.insert(db.to_string());
        self.failing.send_modify(|failing| _ = failing.insert(db.to_string()));
        Ok(())
    }

    /// Announces that the node is ready, and that this primaryship is reached, as soon as they are.
    fn announce_ready(&self) -> JoinHandle<()> {
        let mut targets = self.engine.positions();
        targets.retain(|(name, _)| self.is_of_primary(name.as_str()));
        let awaited = Awaited {
            engine: self.engine.clone(),
            lineage: self.lineage.clone(),
            connection: self.connection,
            targets,
            failing: self.failing.subscribe(),
            ready: self.ready.clone(),
        };
        tokio::spawn(awaited.announce())
    }

    /// Whether the primary has this database, and sends it.
    fn is_of_primary(&self, name: &str) -> bool {
        let is_wanted = self.databases.is_empty() || self.databases.iter().any(|db| db == name);
        is_wanted && !self.lineage.is_foreign(name)
    }
}

fn is_from_peer(error: &engine::Error) -> bool {
    use engine::Error;
    matches!(error, Error::Ltx { .. } | Error::PositionMismatch { .. } | Error::Diverged { .. })
}

#[cfg(test)]
mod tests;
