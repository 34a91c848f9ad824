//! A running node: its parts, opened one after the other, and closed.
//!
//! ```text
//! open:   API port -> databases -> lease task -> mount -> API -> ready -> exec
//! close:  mount -> HALT locks -> API (streams end) -> lease task (lease given back) -> databases
//! ```
//!
//! The mount goes first, so that nothing is committed that the streams do not send any more; what
//! was committed before is sent before a stream ends. Requests that come in while the node opens
//! wait in the port's queue.
//!
//! Invariants: whatever was opened is closed, also after an error or a signal half-way; a signal
//! has its effect at every moment; a step that fails while closing does not keep the later ones
//! from being done.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use ltx::{Compression, NodeId};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};

use super::{Settings, StaleMount};
use crate::cluster::halt::Halts;
use crate::cluster::lease::{Leaser, StaticRole};
use crate::cluster::node::{Candidacy, Node as Cluster, Options as ClusterOptions, Ready};
use crate::config::{BackupKind, Config, Environment, LeaseKind, Passthrough, Transport};
use crate::engine::{self, Engine, PrimaryInfo};
use crate::http::client::Client;
use crate::http::server::{Api, Options as ApiOptions};
use crate::os;
use crate::supervisor::{Candidate, Ending, Signals, Stopper, Supervisor};
use crate::telemetry::log::chain;
use crate::telemetry::{Metrics, say};
use crate::volume::EngineVolume;

/// How many signals, once the node is closing, end the process at once.
const SIGNALS_TO_QUIT: u32 = 2;

/// Runs a node until its process ends or a signal comes; the exit code.
///
/// # Errors
/// A step of opening or closing failed. All that was open is closed.
pub async fn run(settings: &Settings) -> anyhow::Result<u8> {
    let mut signals = Signals::listen().context("listen to signals")?;
    let mut node = Node::default();
    let ended = match serve(settings, &mut signals, &mut node).await {
        Err(error) if !settings.config.exit_on_error => {
            eprintln!("ERROR: {}", chain(error.as_ref()));
            say("waiting for a signal, because exit-on-error is off");
            signals.stop().await;
            Ok(Ending::Signal(1))
        }
        ended => ended,
    };
    let closed = tokio::select! {
        closed = node.close() => closed,
        () = quit(&mut signals) => Err(anyhow::anyhow!("closing was interrupted by a signal")),
    };
    if let (Err(_), Err(error)) = (&ended, &closed) {
        tracing::error!("close: {}", chain(error.as_ref()));
    }
    let ending = ended?;
    closed?;
    if let Ending::Signal(_) = ending {
        say("litefs shut down complete");
    }
    Ok(ending.code())
}

async fn quit(signals: &mut Signals) {
    for left in (0..SIGNALS_TO_QUIT).rev() {
        signals.stop().await;
        if left > 0 {
            say("closing; once more to quit at once");
        }
    }
}

/// Opens the node and runs the commands on it.
async fn serve(
    settings: &Settings,
    signals: &mut Signals,
    node: &mut Node,
) -> anyhow::Result<Ending> {
    let stopper = signals.stopper();
    tokio::select! {
        opened = node.open(settings, stopper) => opened?,
        _ = signals.stop() => {
            say("signal received, litefs shutting down");
            return Ok(Ending::Signal(0));
        }
    }
    if let Some(hint) = &settings.hint {
        say(hint);
    }
    let candidate = match settings.config.lease.candidate {
        true => Candidate::Yes,
        false => Candidate::No,
    };
    let mut supervisor = Supervisor { signals, environment: &settings.environment, candidate };
    Ok(supervisor.run(&settings.config.exec).await?)
}

/// What is open, in the order of opening.
#[derive(Default)]
struct Node {
    engine: Option<Arc<Engine>>,
    halts: Option<Arc<Halts>>,
    cluster: Option<Task>,
    mount: Option<Mount>,
    api: Option<Task>,
}

/// A mounted volume.
struct Mount {
    mount: Arc<fuse::Mount>,
    /// Whether we are unmounting it.
    closing: Arc<AtomicBool>,
    /// Whether it ended before that.
    lost: Arc<AtomicBool>,
}

/// A task that ends when it is told to.
struct Task {
    /// Dropped, it tells the task.
    stop: watch::Sender<()>,
    handle: JoinHandle<()>,
}

impl Task {
    /// Tells the task to end, and waits for it.
    async fn end(self, name: &str) -> anyhow::Result<()> {
        drop(self.stop);
        self.handle.await.with_context(|| format!("end {name}"))
    }
}

impl Node {
    async fn open(&mut self, settings: &Settings, stopper: Stopper) -> anyhow::Result<()> {
        let Settings { config, environment, .. } = settings;
        refuse_unknown_parts(config)?;
        let listener = bind(&config.http.addr).await?;
        let leaser = leaser(config)?;
        let engine = open_engine(config).await?;
        self.engine = Some(engine.clone());
        self.halts = Some(Halts::new(&engine));
        let ready = self.start_cluster(config, &engine, leaser);
        self.mount = Some(mount(settings, &engine, stopper).await?);
        self.start_api(config, environment, engine, listener).await?;
        match config.skip_sync {
            true => say("skipping cluster sync, starting immediately"),
            false => self.wait_until(ready, config).await?,
        }
        say("no proxy target set, skipping proxy");
        Ok(())
    }

    fn start_cluster(&mut self, config: &Config, engine: &Arc<Engine>, leaser: Leaser) -> Ready {
        let lease = &config.lease;
        let options = ClusterOptions {
            candidacy: match lease.candidate {
                true => Candidacy::Candidate,
                false => Candidacy::ReplicaOnly,
            },
            reconnect_delay: lease.reconnect_delay,
            databases: lease.databases.clone(),
        };
        let (cluster, ready) = Cluster::new(engine.clone(), leaser, options);
        let (stop, stopped) = watch::channel(());
        self.cluster = Some(Task { stop, handle: tokio::spawn(cluster.run(stopped)) });
        ready
    }

    async fn start_api(
        &mut self,
        config: &Config,
        environment: &Environment,
        engine: Arc<Engine>,
        listener: TcpListener,
    ) -> anyhow::Result<()> {
        let metrics = Metrics::new()?;
        if let Some(mount) = &self.mount {
            metrics.set_transport(match mount.mount.transport() {
                fuse::Transport::Uring => "uring",
                fuse::Transport::Dev | fuse::Transport::Auto => "dev",
            });
        }
        let timeout = config.http.snapshot_timeout;
        let options = ApiOptions {
            candidate: config.lease.candidate,
            hostname: hostname(config, environment),
            snapshot_timeout: if timeout.is_zero() { config.data.retention } else { Some(timeout) },
            metrics,
        };
        let api = spawn_blocking(move || Api::new(engine, options)).await?;
        let api = api.context("cannot init http server")?;
        let address = listener.local_addr().context("cannot init http server")?;
        let (stop, stopped) = watch::channel(());
        self.api = Some(Task { stop, handle: tokio::spawn(api.serve(listener, stopped)) });
        tracing::info!("http server listening on: {}", shown_url(&config.http.addr, address));
        Ok(())
    }

    /// Waits until this node is primary, or has what its primary has.
    async fn wait_until(&self, mut ready: Ready, config: &Config) -> anyhow::Result<()> {
        tracing::info!("waiting to connect to cluster");
        ready.wait_for(|ready| *ready).await.context("connect to cluster")?;
        tracing::info!("connected to cluster, ready");
        if config.lease.promote {
            // In a static cluster the only candidate is the primary.
            tracing::info!(
                "{}, skipping promotion",
                match config.lease.candidate {
                    true => "node is already primary",
                    false => "node is not a candidate",
                }
            );
        }
        Ok(())
    }

    /// Closes what is open. Every step is done; the first error is returned.
    async fn close(&mut self) -> anyhow::Result<()> {
        let unmounted = match &self.mount {
            Some(mount) => mount.unmount().await,
            None => Ok(()),
        };
        if let Some(halts) = self.halts.take() {
            halts.close().await;
        }
        let served = match self.api.take() {
            Some(api) => api.end("http server").await,
            None => Ok(()),
        };
        let led = match self.cluster.take() {
            Some(cluster) => cluster.end("lease task").await,
            None => Ok(()),
        };
        let closed = match self.engine.take() {
            Some(engine) => close_engine(engine).await,
            None => Ok(()),
        };
        unmounted.and(served).and(led).and(closed)
    }
}

impl Mount {
    async fn unmount(&self) -> anyhow::Result<()> {
        self.closing.store(true, Ordering::SeqCst);
        if self.lost.load(Ordering::SeqCst) {
            anyhow::bail!("{} was unmounted by somebody else", self.mount.dir().display());
        }
        let mount = self.mount.clone();
        spawn_blocking(move || mount.unmount()).await?.context("unmount")
    }
}

/// A configuration that asks for what this version does not have is refused, not half done.
fn refuse_unknown_parts(config: &Config) -> anyhow::Result<()> {
    if !config.proxy.target.is_empty() {
        anyhow::bail!("proxy.target is set, but this version has no proxy");
    }
    if config.backup.kind != BackupKind::None {
        anyhow::bail!("backup.type is set, but this version has no backup client");
    }
    if config.tracing.enabled && !config.tracing.path.as_os_str().is_empty() {
        tracing::warn!("tracing.path is set, but this version writes no trace file");
    }
    Ok(())
}

/// Takes the API's port; it is served later. An empty host means every address.
async fn bind(addr: &str) -> anyhow::Result<TcpListener> {
    let bound = match addr.strip_prefix(':') {
        Some(port) => match TcpListener::bind(format!("[::]:{port}")).await {
            // A machine without IPv6.
            Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
                TcpListener::bind(format!("0.0.0.0:{port}")).await
            }
            bound => bound,
        },
        None => TcpListener::bind(addr).await,
    };
    bound
        .with_context(|| format!("cannot init http server: cannot open http server: listen {addr}"))
}

/// The URL as people type it: `localhost` for an empty host, and the real port.
fn shown_url(addr: &str, bound: std::net::SocketAddr) -> String {
    let host = addr.rsplit_once(':').map_or(addr, |(host, _)| host);
    let host = if host.is_empty() { "localhost" } else { host };
    format!("http://{host}:{}", bound.port())
}

fn leaser(config: &Config) -> anyhow::Result<Leaser> {
    let lease = &config.lease;
    match lease.kind {
        Some(LeaseKind::Consul) => anyhow::bail!("this version knows the static lease only"),
        Some(LeaseKind::Static) | None => {}
    }
    tracing::info!(
        "Using static primary: primary={} hostname={} advertise-url={}",
        lease.candidate,
        lease.hostname,
        lease.advertise_url
    );
    let primary = PrimaryInfo {
        hostname: lease.hostname.clone(),
        advertise_url: lease.advertise_url.clone(),
    };
    let role = if lease.candidate { StaticRole::Primary } else { StaticRole::Replica };
    if role == StaticRole::Replica {
        Client::new(&lease.advertise_url).with_context(|| {
            format!("lease.advertise-url must be the primary's URL, got {:?}", lease.advertise_url)
        })?;
    }
    Ok(Leaser::Static { role, primary })
}

fn hostname(config: &Config, environment: &Environment) -> String {
    match config.lease.hostname.as_str() {
        "" => environment.hostname(),
        hostname => hostname.to_owned(),
    }
}

async fn open_engine(config: &Config) -> anyhow::Result<Arc<Engine>> {
    let data = &config.data;
    let options = engine::Options {
        dir: data.dir.clone(),
        compression: if data.compress { Compression::Lz4 } else { Compression::None },
        retention: data.retention.unwrap_or_default(),
        retention_interval: data.retention_monitor_interval.unwrap_or_default(),
        strict_verify: config.strict_verify,
        node_id: draw_node_id()?,
        clock: Box::new(now_ms),
    };
    let engine =
        spawn_blocking(move || Engine::open(options)).await?.context("open data directory")?;
    if let Some(id) = engine.cluster_id() {
        tracing::info!("using existing cluster id: \"{id}\"");
    }
    Ok(engine)
}

async fn close_engine(engine: Arc<Engine>) -> anyhow::Result<()> {
    spawn_blocking(move || engine.close()).await?.context("close data directory")
}

/// Drawn anew at each start, so that a node that comes back is not taken for its former self.
fn draw_node_id() -> anyhow::Result<NodeId> {
    let id = getrandom::u64().map_err(|error| anyhow::anyhow!("draw node id: {error}"))?;
    Ok(NodeId(id))
}

/// The wall clock in milliseconds since the Unix epoch.
fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

async fn mount(
    settings: &Settings,
    engine: &Arc<Engine>,
    stopper: Stopper,
) -> anyhow::Result<Mount> {
    let Settings { config, stale_mount, .. } = settings;
    let fuse = &config.fuse;
    let dir = fuse.dir.clone();
    let options = fuse::MountOptions {
        allow_other: fuse.allow_other,
        passthrough: match fuse.passthrough {
            Passthrough::Auto => fuse::PassthroughMode::Auto,
            Passthrough::Off => fuse::PassthroughMode::Off,
        },
        skip_unmount_stale: *stale_mount == StaleMount::Keep,
        debug: fuse.debug,
        transport: match fuse.transport {
            Transport::Auto => fuse::Transport::Auto,
            Transport::Uring => fuse::Transport::Uring,
            Transport::Dev => fuse::Transport::Dev,
        },
        enable_uring: fuse.enable_uring,
        ..fuse::MountOptions::new(&fuse.dir, probe_file(&config.data.dir)?)
    };
    let volume = Arc::new(EngineVolume::new(engine.clone()));
    let mount = spawn_blocking(move || {
        make_directory(&dir)?;
        fuse::mount(volume, options).context("cannot open file system")
    });
    let mount = Arc::new(mount.await??);
    let mounted = Mount { mount, closing: Arc::default(), lost: Arc::default() };
    let (closing, lost) = (mounted.closing.clone(), mounted.lost.clone());
    mounted.mount.on_end(move || {
        if !closing.load(Ordering::SeqCst) {
            lost.store(true, Ordering::SeqCst);
            stopper.stop();
        }
    });
    say(format_args!("LiteFS mounted to: {}", config.fuse.dir.display()));
    Ok(mounted)
}

/// Makes the mount point if it is missing. One that is there, even the mount of a process that is
/// gone, is left as it is.
fn make_directory(dir: &Path) -> anyhow::Result<()> {
    match dir.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            os::create_dirs("mount:dir", dir)
                .with_context(|| format!("make mount point {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// A file without a name on the file system of the databases.
fn probe_file(dir: &Path) -> anyhow::Result<std::fs::File> {
    let path = dir.join("probe.tmp");
    let make = || -> std::io::Result<_> {
        os::remove_if_present("mount:probe", &path)?;
        let file = os::create_new("mount:probe", &path)?;
        os::remove("mount:probe", &path)?;
        Ok(file)
    };
    make().with_context(|| format!("make {}", path.display()))
}
