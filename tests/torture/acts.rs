//! What a node does beside the transactions of one database: it is stopped and started, its client dies,
//! two databases change together, and what it has goes to a backup or through its HTTP API.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use litefs::cluster::backup::directory::Directory;
use litefs::cluster::backup::{Error, Written};
use litefs::cluster::lease::{Leaser, StaticRole};
use litefs::cluster::node::{Candidacy, Node as RoleTask, Options as RoleOptions};
use litefs::cluster::peers::Identity;
use litefs::engine::backup::Need;
use litefs::engine::{self, ClusterId, DbName, Engine, PrimaryInfo, chain_text};
use litefs::http::client::{Client as Api, StreamRequest};
use litefs::http::frame::{Event, Frame};
use litefs::http::security::Security;
use litefs::http::server;
use litefs::telemetry::Metrics;
use ltx::{NodeId, Pos};
use tokio::sync::watch;

use super::script::{DB, Effect, TWO, World, row};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

fn text(error: &dyn std::error::Error) -> String {
    chain_text(error)
}

/// Brings the backup in a directory to where the database stands, as a node does in rounds; or the
/// database to where the backup stands.
pub fn back_up(engine: &Arc<Engine>, dir: &Path) -> Result<(), String> {
    // By whoever wants a backup.
    std::fs::create_dir_all(dir).map_err(|error| text(&error))?;
    let store = Directory::new(dir.to_owned());
    let name = DbName::new(DB).unwrap();
    let failed = |error: Error| text(&error);
    loop {
        let at = store.positions().map_err(failed)?.remove(DB).unwrap_or(Ok(Pos::ZERO));
        let at = at.map_err(failed)?;
        let need = match engine.database(DB) {
            Some(db) => db.backup_need(at).map_err(|error| text(&error))?,
            None if at.is_zero() => Need::Nothing,
            None => Need::Restore(Pos::ZERO),
        };
        match need {
            Need::Nothing => return Ok(()),
            Need::Diverged(why) => return Err(why),
            Need::Restore(local) => {
                let mut receiver = engine.receive(&name).map_err(|error| text(&error))?;
                store.snapshot(&name, &mut receiver).map_err(failed)?;
                receiver.finish_restore(local).map_err(|error| text(&error))?;
            }
            Need::Upload(upload) => {
                let size = (upload.header.commit > 0).then_some(upload.header.page_size);
                if let Written::Taken { hwm } =
                    store.write(&name, &upload, &|| true).map_err(failed)?
                {
                    let db = engine.database(DB).unwrap();
                    db.set_backed(upload.pos, hwm, size).map_err(|error| text(&error))?;
                }
            }
        }
    }
}

/// The API of an engine on a free port, for as long as `call` takes.
fn with_api<T>(
    engine: &Arc<Engine>,
    call: impl AsyncFnOnce(Api) -> Result<T, String>,
) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let info = PrimaryInfo { hostname: String::new(), advertise_url: String::new() };
        let options = RoleOptions {
            candidacy: Candidacy::Candidate,
            reconnect_delay: PATIENCE,
            databases: Vec::new(),
            hostname: String::new(),
            security: Security::default(),
        };
        let leaser = Leaser::Static { role: StaticRole::Primary, primary: info };
        let (_task, control, _ready) = RoleTask::new(engine.clone(), leaser, options);
        let options = server::Options {
            ready: tokio::sync::watch::channel(true).1,
            candidate: true,
            hostname: String::new(),
            snapshot_timeout: Some(PATIENCE),
            proxy_url: None,
            metrics: Metrics::new().unwrap(),
            control,
            security: Security::default(),
        };
        let api = server::Api::new(engine.clone(), options).map_err(|error| text(&error))?;
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = watch::channel(());
        let served = tokio::spawn(api.serve(listener, stopped));
        let called = call(Api::new(&url, &Security::default()).unwrap());
        let called = tokio::time::timeout(PATIENCE, called).await.expect("an answer");
        drop(stop);
        tokio::time::timeout(PATIENCE, served).await.expect("an end").unwrap();
        called
    })
}

/// Sends a database file to the API.
pub fn upload(engine: &Arc<Engine>, file: &Path) -> Result<(), String> {
    with_api(engine, async |api| {
        let opened = tokio::fs::File::open(file).await.unwrap();
        let len = opened.metadata().await.unwrap().len();
        api.import(DB, opened, Some(len)).await.map_err(|error| text(&error))
    })
}

/// The database file that the API sends.
pub fn download(engine: &Arc<Engine>) -> Result<Vec<u8>, String> {
    with_api(engine, async |api| {
        let mut bytes = Vec::new();
        api.export(DB, &mut bytes).await.map_err(|error| text(&error))?;
        Ok(bytes)
    })
}

/// The LTX files that a replica at `pos` gets by a stream, until it has what was there at its beginning.
pub fn follow(engine: &Arc<Engine>, pos: Pos) -> Result<Vec<Vec<u8>>, String> {
    with_api(engine, async |api| {
        let identity = Identity { node_id: NodeId(2), hostname: String::new(), candidacy: None };
        let positions = [(DB, pos)];
        let request = StreamRequest { identity: &identity, positions: &positions, filter: &[] };
        let mut stream = api.stream(request).await.map_err(|error| text(&error))?;
        let (mut files, mut file) = (Vec::new(), Vec::new());
        loop {
            match stream.next().await.map_err(|error| text(&error))? {
                None => return Err("the stream has ended".to_owned()),
                Some(Event::LtxData(data)) => file.extend_from_slice(&data),
                Some(Event::LtxEnd) => files.push(std::mem::take(&mut file)),
                Some(Event::Frame(Frame::Ready)) => return Ok(files),
                Some(Event::Frame(_)) => {}
            }
        }
    })
}

impl World {
    /// Stops and starts the node. What keeps it from starting goes after the first attempt.
    pub fn begin_again(&mut self) -> Result<(), String> {
        let mut told = self.stop();
        if let Err(error) = self.open_again() {
            told = Err(text(&error));
            self.recorder.calm();
            self.open_again().map_err(|error| text(&error))?;
        }
        told
    }

    /// A commit in which the next call with a label fails.
    pub fn insert_with(&mut self, label: &'static str) -> (Result<(), String>, bool) {
        self.recorder.stage(label);
        let told = self.act_with(Effect::Row, |world, n| {
            world.sql(&format!("BEGIN IMMEDIATE; {}; COMMIT", row(n, 700)))
        });
        (told, !self.recorder.unstage())
    }

    /// A client dies with pages in the database file of a transaction that is not committed.
    pub fn die(&mut self) -> Result<(), String> {
        self.act_with(Effect::Same, |world, n| {
            let told = world.connection()?.execute_batch(&format!(
                "BEGIN IMMEDIATE; {}; UPDATE filler SET x = 'x{n}' || x; DELETE FROM t",
                row(n, 10)
            ));
            world.kill();
            told.map_err(|error| error.to_string())
        })
    }

    /// A transaction over two databases.
    pub fn insert_in_both(&mut self) -> Result<(), String> {
        let mode = self.mode();
        let effect = if mode.is_wal() { Effect::RowInEach } else { Effect::RowInBoth };
        let attach = format!(
            "ATTACH '{TWO}' AS two; PRAGMA two.page_size = 1024; PRAGMA two.cache_size = 8; \
             PRAGMA two.synchronous = {}; PRAGMA two.journal_mode = {}; \
             CREATE TABLE IF NOT EXISTS two.t (n INTEGER PRIMARY KEY, x)",
            mode.synchronous, mode.journal
        );
        let attached = self.act_with(Effect::Same, |world, _| world.sql(&attach));
        let done = attached.and_then(|()| {
            self.act_with(effect, |world, n| {
                let two = row(n, 500).replace("INTO t", "INTO two.t");
                world.sql(&format!("BEGIN IMMEDIATE; {}; {two}; COMMIT", row(n, 700)))
            })
        });
        let left = self.sql("DETACH two");
        if left.is_err() {
            self.disconnect();
        }
        done.and(left)
    }

    /// A replica that was at the last position when this was done last gets what it lacks.
    pub fn serve_a_stream(&mut self) -> Result<(), String> {
        let from = self.streamed;
        let target = self.db().ok_or("no database")?.pos();
        let files = follow(&self.engine, from)?;
        let mut at = from;
        for file in files {
            let verified = ltx::verify(&file[..]).map_err(|error| text(&error));
            let (header, trailer) = verified.expect("what is sent is whole");
            assert!(header.is_snapshot() || header.pre_pos().txid <= at.txid, "after {at}");
            at = Pos { txid: header.max_txid, checksum: trailer.post_apply };
        }
        self.streamed = at;
        // What cannot be read now comes later.
        if at == target { Ok(()) } else { Err(format!("the stream is at {at}, not at {target}")) }
    }

    /// The node becomes one of a cluster.
    pub fn join(&self) -> Result<(), String> {
        let id = ClusterId::new("LFSC0123456789ABCDEF").expect("an id");
        let set: engine::Result<()> = self.engine.set_cluster_id(&id);
        set.map_err(|error| text(&error))
    }
}
