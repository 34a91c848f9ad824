//! A node without a mount: engine, API and the task that decides its role, on a free port.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use litefs::cluster::control::Control;
use litefs::cluster::lease::{Leaser, StaticRole};
use litefs::cluster::node::{Candidacy, Node as RoleTask, Options as RoleOptions, Ready};
use litefs::cluster::peers::Identity;
use litefs::engine::{self, DbName, DbState, Engine, PrimaryInfo};
use litefs::http::client::Client;
use litefs::http::security::Security;
use litefs::http::server::{Api, Options};
use litefs::telemetry::Metrics;
use ltx::{Compression, NodeId, Pos};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Longest wait for something that must come.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A running node; dropped, it stops.
pub struct Node {
    pub engine: Arc<Engine>,
    pub url: String,
    pub ready: Ready,
    pub client: Client,
    control: Control,
    api: Task,
    role: Task,
}

/// A replica of that id.
pub fn identity(id: u64) -> Identity {
    Identity { node_id: NodeId(id), hostname: String::new(), candidacy: None }
}

/// A task that ends when its signal is dropped.
type Task = (watch::Sender<()>, JoinHandle<()>);

async fn stop((stop, task): Task) {
    drop(stop);
    tokio::time::timeout(DEADLINE, task).await.expect("stops in time").unwrap();
}

fn serve(engine: &Arc<Engine>, listener: TcpListener, candidate: bool, control: Control) -> Task {
    let options = Options {
        ready: watch::channel(true).1,
        candidate,
        hostname: "primary-host".to_owned(),
        snapshot_timeout: Some(DEADLINE),
        proxy_url: None,
        metrics: Metrics::new().unwrap(),
        control,
        security: Security::default(),
    };
    let api = Api::new(engine.clone(), options).unwrap();
    let (stop, stopped) = watch::channel(());
    (stop, tokio::spawn(api.serve(listener, stopped)))
}

/// An engine on `dir` of a node with that id.
pub fn open_engine(dir: &Path, id: u64) -> Arc<Engine> {
    let options = engine::Options {
        dir: dir.to_owned(),
        compression: Compression::Lz4,
        retention: Duration::from_secs(600),
        retention_interval: Duration::ZERO,
        retain: engine::Retain::Free,
        strict_verify: true,
        node_id: NodeId(id),
        clock: Box::new(now_ms),
    };
    Engine::open(options).unwrap()
}

/// The wall clock, as heartbeats carry it.
pub fn now_ms() -> i64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as i64
}

impl Node {
    /// The primary of a static cluster, ready.
    pub async fn primary(dir: &Path, id: u64) -> Node {
        Node::primary_at(dir, id, "127.0.0.1:0").await
    }

    /// The same at a fixed address, to come back there.
    pub async fn primary_at(dir: &Path, id: u64, address: &str) -> Node {
        let listener = bind(address.parse().unwrap()).await;
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut node = Node::start(dir, id, listener, StaticRole::Primary, &url, &[]);
        node.ready.wait_for(|ready| *ready).await.unwrap();
        node
    }

    /// A replica of the primary at `url`.
    pub async fn replica(dir: &Path, id: u64, url: &str) -> Node {
        Node::replica_of(dir, id, url, &[]).await
    }

    /// A replica that wants only some databases.
    pub async fn replica_of(dir: &Path, id: u64, url: &str, databases: &[&str]) -> Node {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await;
        Node::start(dir, id, listener, StaticRole::Replica, url, databases)
    }

    fn start(
        dir: &Path,
        id: u64,
        listener: TcpListener,
        role: StaticRole,
        primary_url: &str,
        databases: &[&str],
    ) -> Node {
        let engine = open_engine(dir, id);
        let url = format!("http://{}", listener.local_addr().unwrap());
        let primary = PrimaryInfo {
            hostname: "primary-host".to_owned(),
            advertise_url: primary_url.to_owned(),
        };
        let options = RoleOptions {
            candidacy: match role {
                StaticRole::Primary => Candidacy::Candidate,
                StaticRole::Replica => Candidacy::ReplicaOnly,
            },
            reconnect_delay: Duration::from_millis(50),
            databases: databases.iter().map(|name| name.to_string()).collect(),
            hostname: "own-host".to_owned(),
            security: Security::default(),
        };
        let candidate = role == StaticRole::Primary;
        let leaser = Leaser::Static { role, primary };
        let (task, control, ready) = RoleTask::new(engine.clone(), leaser, options);
        let api = serve(&engine, listener, candidate, control.clone());
        let (stop, stopped) = watch::channel(());
        let role = (stop, tokio::spawn(task.run(stopped)));
        let client = Client::new(&url, &Security::default()).unwrap();
        Node { engine, url, ready, client, control, api, role }
    }

    /// Waits until the node has everything its primary had when it connected.
    pub async fn wait_ready(&mut self) {
        let ready = self.ready.wait_for(|ready| *ready);
        tokio::time::timeout(DEADLINE, ready).await.expect("ready in time").unwrap();
    }

    /// Ends the API and all its connections.
    pub async fn stop_api(&mut self) {
        let (unused, _) = watch::channel(());
        stop(std::mem::replace(&mut self.api, (unused, tokio::spawn(async {})))).await;
    }

    /// Serves a new API at the same address.
    pub async fn start_api(&mut self) {
        let listener = bind(self.client.address().parse().unwrap()).await;
        self.api = serve(&self.engine, listener, true, self.control.clone());
    }

    /// Stops the node and waits until its tasks are over.
    pub async fn stop(self) {
        stop(self.api).await;
        stop(self.role).await;
        self.engine.close().unwrap();
    }

    /// Where a database stands; zero if there is none.
    pub fn pos(&self, name: &str) -> Pos {
        self.engine.database(name).map_or(Pos::ZERO, |db| db.pos())
    }

    /// Waits until the database stands at `pos`.
    pub async fn wait_for_pos(&self, name: &str, pos: Pos) {
        wait_until(
            || self.pos(name) == pos,
            || {
                let state = self.engine.database(name).map(|db| db.state());
                format!("{name} at {pos}; it is at {} ({state:?})", self.pos(name))
            },
        )
        .await;
    }

    /// Replaces the database `name` by one made by `sql`; its new position.
    pub async fn import(&self, name: &str, sql: &str) -> Pos {
        let engine = self.engine.clone();
        let (name, sql) = (DbName::new(name).unwrap(), sql.to_owned());
        let import = tokio::task::spawn_blocking(move || {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("made");
            make_database(&path, &sql);
            engine.import(&name, &path).unwrap()
        });
        import.await.unwrap()
    }

    /// The bytes of a database, with what its WAL holds.
    pub async fn export(&self, name: &str) -> Vec<u8> {
        let db = self.engine.database(name).unwrap();
        assert_eq!(db.state(), DbState::Ready);
        let export = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            db.export(&mut bytes).map(|_| bytes).unwrap()
        });
        export.await.unwrap()
    }
}

/// Makes a SQLite file, in WAL mode but without a WAL.
pub fn make_database(path: &Path, sql: &str) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.pragma_update(None, "journal_mode", "wal").unwrap();
    connection.execute_batch(sql).unwrap();
    connection.close().unwrap();
}

/// Waits until `condition` holds; `wanted` says what did not come in time.
pub async fn wait_until(condition: impl Fn() -> bool, wanted: impl Fn() -> String) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < DEADLINE, "waited in vain for {}", wanted());
        tokio::time::interval(Duration::from_millis(5)).tick().await;
        tokio::task::yield_now().await;
    }
}

/// Binds an address that a stopped node may have left a moment ago.
async fn bind(address: SocketAddr) -> TcpListener {
    let begin = Instant::now();
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => assert!(begin.elapsed() < DEADLINE, "bind {address}: {error}"),
        }
        tokio::task::yield_now().await;
    }
}
