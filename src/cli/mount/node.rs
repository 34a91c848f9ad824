//! A running node: its parts, opened one after the other, and closed.
//!
//! ```text
//! open:   ports -> databases -> lease task, backup -> proxy -> mount -> API -> ready -> exec
//! close:  proxy -> lease handed over -> mount -> HALT locks -> backup -> API (streams end) -> lease task
//!         (lease given back) -> databases
//! ```
//!
//! A lease that another node can take is handed over while everything works. Else it is given back last:
//! the mount goes before the API, so that nothing is committed that the streams do not send any
//! more; what was committed before is sent before a stream ends. Requests to the API that come in
//! while the node opens wait in the port's queue; the proxy says that the node is not ready.
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
use tokio::net::{TcpListener, lookup_host};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep};

use super::fly::{Machine, RoleReport};
use super::{Settings, StaleMount, users};
use crate::cluster::backup::begun::Begun;
use crate::cluster::backup::cloud::{Cloud, Options as CloudOptions};
use crate::cluster::backup::{Backup, Store, Timing, has_no_data};
use crate::cluster::consul::address::Address;
use crate::cluster::consul::client::Client as ConsulClient;
use crate::cluster::consul::{Consul, Options as ConsulOptions};
use crate::cluster::control::{Control, PromoteError};
use crate::cluster::election::Force;
use crate::cluster::halt::Halts;
use crate::cluster::lease::{Leaser, StaticRole};
use crate::cluster::node::{Candidacy, Node as Cluster, Options as ClusterOptions, Ready};
use crate::config::{
    self, BackupKind, Config, Environment, LeaseKind, Passthrough, Transport, machine_name,
};
use crate::engine::layout::DataDir;
use crate::engine::{self, Engine, PrimaryInfo, Retain, Role};
use crate::http::proxy::{self, Admission, Links, Proxy, Way};
use crate::http::security::Security;
use crate::http::server::{Api, Options as ApiOptions};
use crate::http::url::{Scheme, Url};
use crate::supervisor::descriptors::Former;
use crate::supervisor::{Candidate, Ending, Signals, Stopper, Supervisor};
use crate::telemetry::log::chain;
use crate::telemetry::{Metrics, complain, say};
use crate::volume::EngineVolume;
use crate::{limits, os, threads};

/// Between two attempts to unmount.
const UNMOUNT_LOOK: std::time::Duration = std::time::Duration::from_millis(10);

/// How many signals, once the node is closing, end the process at once.
const SIGNALS_TO_QUIT: u32 = 2;

/// Runs a node until its process ends or a signal comes; the exit code. What it runs gets the limit of
/// `descriptors`, if that is not ours.
///
/// # Errors
/// A step of opening or closing failed. All that was open is closed.
pub async fn run(settings: &Settings, descriptors: Option<Former>) -> anyhow::Result<u8> {
    let mut signals = Signals::listen().context("listen to signals")?;
    let mut node = Node::default();
    let ended = match serve(settings, descriptors, &mut signals, &mut node).await {
        Err(error) if !settings.config.exit_on_error => {
            complain(format_args!("ERROR: {}", chain(error.as_ref())));
            say("waiting for a signal, because exit-on-error is off");
            signals.stop_idle().await;
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
    descriptors: Option<Former>,
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
    let environment = &settings.environment;
    let mut supervisor = Supervisor { signals, environment, candidate, descriptors };
    Ok(supervisor.run(&settings.config.exec).await?)
}

/// What is open, in the order of opening.
#[derive(Default)]
struct Node {
    engine: Option<Arc<Engine>>,
    control: Option<Control>,
    halts: Option<Arc<Halts>>,
    backup: Option<Task>,
    cluster: Option<Task>,
    fly: Option<RoleReport>,
    proxy: Option<Task>,
    mount: Option<Mount>,
    api: Option<Task>,
}

/// What the lease task says of itself.
struct Membership {
    ready: Ready,
    links: Links,
    control: Control,
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
        if config.lease.demote_delay != config::Lease::default().demote_delay {
            tracing::warn!("lease.demote-delay has no effect: nothing demotes a primary");
        }
        if is_fly(environment) {
            tracing::info!("host environment detected type=fly.io");
        }
        let metrics = Metrics::new()?;
        let security = Security::new(&config.http)?;
        say_backup(config);
        let listener = bind_api(&config.http.addr).await?;
        let proxy_listener = bind_proxy(&config.proxy).await?;
        let node_id = draw_node_id()?;
        let port = listener.local_addr().context("cannot init http server")?.port();
        let leaser = leaser(config, environment, port, node_id, &security)?;
        let engine = match &proxy_listener {
            Some(listener) => tokio::select! {
                engine = open_engine(config, node_id) => engine?,
                never = proxy::refuse_all(listener) => match never {},
            },
            None => open_engine(config, node_id).await?,
        };
        self.engine = Some(engine.clone());
        self.halts = Some(Halts::new(&engine, &security));
        self.fly = Machine::of(environment).map(|machine| RoleReport::start(machine, &engine));
        let store = store(config, &engine)?;
        let membership = self.start_cluster(config, &engine, leaser, store, &security);
        let proxy_url = match proxy_listener {
            Some(listener) => {
                let url = proxy_url(config, &listener, &security)?;
                let options = proxy_options(settings, &metrics, &security);
                self.start_proxy(
                    engine.clone(),
                    &membership,
                    listener,
                    &config.proxy.addr,
                    options,
                )?;
                Some(url)
            }
            None => None,
        };
        let mount = mount(settings, &engine, stopper).await?;
        metrics.set_transport(match mount.mount.transport() {
            fuse::Transport::Uring => "uring",
            fuse::Transport::Dev | fuse::Transport::Auto => "dev",
        });
        self.mount = Some(mount);
        let timeout = config.http.snapshot_timeout;
        let options = ApiOptions {
            ready: if config.skip_sync { watch::channel(true).1 } else { membership.ready.clone() },
            candidate: config.lease.candidate,
            hostname: hostname(config),
            snapshot_timeout: if timeout.is_zero() { config.data.retention } else { Some(timeout) },
            proxy_url,
            metrics,
            control: membership.control.clone(),
            security,
        };
        self.start_api(config, options, engine, listener).await?;
        match config.skip_sync {
            true => tracing::info!("skipping cluster sync, starting immediately"),
            false => self.wait_until(membership.ready, &membership.control, config).await?,
        }
        Ok(())
    }

    fn start_cluster(
        &mut self,
        config: &Config,
        engine: &Arc<Engine>,
        leaser: Leaser,
        store: Option<Store>,
        security: &Security,
    ) -> Membership {
        let lease = &config.lease;
        let options = ClusterOptions {
            candidacy: match lease.candidate {
                true => Candidacy::Candidate,
                false => Candidacy::ReplicaOnly,
            },
            reconnect_delay: lease.reconnect_delay,
            databases: lease.databases.clone(),
            hostname: hostname(config),
            security: security.clone(),
        };
        let (cluster, control, ready) = Cluster::new(engine.clone(), leaser, options);
        let links = cluster.links();
        let ready = match store {
            Some(store) => {
                let restored = self.start_backup(config, engine, store, cluster.leads());
                when_restored(engine.clone(), ready, restored, links.clone())
            }
            None => ready,
        };
        let (stop, stopped) = watch::channel(());
        self.cluster = Some(Task { stop, handle: tokio::spawn(cluster.run(stopped)) });
        self.control = Some(control.clone());
        Membership { ready, links, control }
    }

    /// Starts the backup; whether this node has what it has.
    fn start_backup(
        &mut self,
        config: &Config,
        engine: &Arc<Engine>,
        store: Store,
        leads: watch::Receiver<bool>,
    ) -> watch::Receiver<bool> {
        let config::Backup { delay, full_sync_interval, .. } = config.backup;
        let timing = Timing { delay, full_sync: full_sync_interval };
        let (backup, restored) = Backup::new(engine.clone(), store, timing, leads);
        let (stop, stopped) = watch::channel(());
        self.backup = Some(Task { stop, handle: tokio::spawn(backup.run(stopped)) });
        restored
    }

    fn start_proxy(
        &mut self,
        engine: Arc<Engine>,
        membership: &Membership,
        listener: TcpListener,
        addr: &str,
        options: proxy::Options,
    ) -> anyhow::Result<()> {
        let address = listener.local_addr().context("cannot init proxy server")?;
        let Membership { ready, links, .. } = membership;
        let proxy = Proxy::new(engine, links.clone(), ready.clone(), options);
        let (stop, stopped) = watch::channel(());
        self.proxy = Some(Task { stop, handle: tokio::spawn(proxy.serve(listener, stopped)) });
        let url = shown_url(Scheme::Http, addr, address);
        tracing::info!("proxy server listening on: {url}");
        Ok(())
    }

    async fn start_api(
        &mut self,
        config: &Config,
        options: ApiOptions,
        engine: Arc<Engine>,
        listener: TcpListener,
    ) -> anyhow::Result<()> {
        let scheme = scheme(&options.security);
        let api = spawn_blocking(move || Api::new(engine, options)).await?;
        let api = api.context("cannot init http server")?;
        let address = listener.local_addr().context("cannot init http server")?;
        let (stop, stopped) = watch::channel(());
        self.api = Some(Task { stop, handle: tokio::spawn(api.serve(listener, stopped)) });
        tracing::info!(
            "http server listening on: {}",
            shown_url(scheme, &config.http.addr, address)
        );
        Ok(())
    }

    /// Waits until this node is primary, or has what its primary has.
    async fn wait_until(
        &self,
        mut ready: Ready,
        control: &Control,
        config: &Config,
    ) -> anyhow::Result<()> {
        tracing::info!("waiting to connect to cluster");
        ready.wait_for(|ready| *ready).await.context("connect to cluster")?;
        tracing::info!("connected to cluster, ready");
        let is_primary = self.engine.as_ref().is_some_and(|engine| engine.role() == Role::Primary);
        match (config.lease.promote, config.lease.candidate) {
            (false, _) => {}
            (true, false) => {
                tracing::info!("node is not a candidate, skipping automatic promotion")
            }
            (true, true) if is_primary => {
                tracing::info!("node is already primary, skipping promotion");
            }
            (true, true) => promote(control).await?,
        }
        Ok(())
    }

    /// Closes what is open. Every step is done; the first error is returned.
    async fn close(&mut self) -> anyhow::Result<()> {
        let refused = match self.proxy.take() {
            Some(proxy) => proxy.end("proxy server").await,
            None => Ok(()),
        };
        if let Some(control) = self.control.take() {
            control.step_down().await;
        }
        let unmounted = match &self.mount {
            Some(mount) => mount.unmount().await,
            None => Ok(()),
        };
        if let Some(halts) = self.halts.take() {
            halts.close().await;
        }
        let backed_up = match self.backup.take() {
            Some(backup) => backup.end("backup").await,
            None => Ok(()),
        };
        let served = match self.api.take() {
            Some(api) => api.end("http server").await,
            None => Ok(()),
        };
        let led = match self.cluster.take() {
            Some(cluster) => cluster.end("lease task").await,
            None => Ok(()),
        };
        // The role was given up; telling that may take a moment.
        let fly = self.fly.take();
        let told = spawn_blocking(move || drop(fly)).await.context("end report of role");
        let closed = match self.engine.take() {
            Some(engine) => close_engine(engine).await,
            None => Ok(()),
        };
        refused.and(unmounted).and(backed_up).and(served).and(led).and(told).and(closed)
    }
}

impl Mount {
    async fn unmount(&self) -> anyhow::Result<()> {
        self.closing.store(true, Ordering::SeqCst);
        if self.lost.load(Ordering::SeqCst) {
            anyhow::bail!("{} was unmounted by somebody else", self.mount.dir().display());
        }
        let mount = self.mount.clone();
        let unmounted = spawn_blocking(move || {
            let unmounted = unmount(&mount);
            // Asked while its files still have names.
            let users = match &unmounted {
                Err(fuse::Error::Busy { dir }) => users::describe(dir),
                _ => String::new(),
            };
            unmounted.map_err(|error| match users.as_str() {
                "" => anyhow::Error::new(error).context("unmount"),
                users => anyhow::anyhow!("unmount: {error}: {users}"),
            })
        });
        unmounted.await?
    }
}

/// Unmounts; programs that have just opened a file are given a moment.
fn unmount(mount: &fuse::Mount) -> Result<(), fuse::Error> {
    let end = std::time::Instant::now() + limits::UNMOUNT_BUSY_WAIT;
    loop {
        match mount.unmount() {
            Err(fuse::Error::Busy { .. }) if std::time::Instant::now() < end => {
                std::thread::park_timeout(UNMOUNT_LOOK);
            }
            unmounted => return unmounted,
        }
    }
}

/// Says where backups go, in LiteFS's words.
fn say_backup(config: &Config) {
    let backup = &config.backup;
    match backup.kind {
        BackupKind::None => tracing::info!("no backup client configured, skipping"),
        BackupKind::File => {
            tracing::info!("file-based backup client configured: file://{}", backup.path.display());
        }
        BackupKind::LitefsCloud => {
            // Without what else may stand in a URL, such as a password.
            let url = Url::new(&backup.url).map(|url| url.to_string()).unwrap_or_default();
            tracing::info!("litefs cloud backup client configured: {url}");
        }
    }
}

/// Where backups go, if there are any.
fn store(config: &Config, engine: &Arc<Engine>) -> anyhow::Result<Option<Store>> {
    let config::Backup { kind, path, url, cluster, auth_token, .. } = config.backup.clone();
    Ok(match kind {
        BackupKind::None => None,
        BackupKind::File => Some(Store::directory(path)),
        BackupKind::LitefsCloud => {
            let engine = engine.clone();
            let id = move || engine.cluster_id().map(|id| id.to_string());
            let cloud = Cloud::new(&CloudOptions { url, cluster, auth_token }, Box::new(id));
            Some(Store::cloud(cloud.context("cannot init store: backup client")?))
        }
    })
}

/// True once the node is `ready` and, if it may lack something of its backup, has that too.
fn when_restored(
    engine: Arc<Engine>,
    ready: Ready,
    restored: watch::Receiver<bool>,
    links: Links,
) -> Ready {
    let (sender, is_ready) = watch::channel(false);
    tokio::spawn(async move {
        if wait_for_restore(&engine, ready, restored, links).await {
            sender.send_replace(true);
        }
    });
    is_ready
}

/// Waits until the node is ready and, if it is a primary without any data or died before it had all of
/// its backup, what that has was restored: an application that began before that would begin another
/// history. Whether it came to that.
async fn wait_for_restore(
    engine: &Engine,
    mut ready: Ready,
    mut restored: watch::Receiver<bool>,
    mut links: Links,
) -> bool {
    if ready.wait_for(|ready| *ready).await.is_err() {
        return false;
    }
    let begun = Begun::new(engine.layout());
    if let Role::Replica(_) = engine.role() {
        // It has what its primary has, and nothing is left to restore.
        if let Ok(Err(error)) = spawn_blocking(move || begun.forget()).await {
            tracing::warn!(error = chain(&error), "forget restore");
        }
        return true;
    }
    let why = match (begun.is_noted(), has_no_data(engine)) {
        _ if *restored.borrow() => return true,
        (true, _) => "a restore from the backup was begun: waiting for the rest",
        (false, true) => "this node has no data: waiting for what its backup has",
        (false, false) => return true,
    };
    tracing::info!("{why}");
    tokio::select! {
        restored = restored.wait_for(|restored| *restored) => restored.is_ok(),
        // A lease that is only lost may come back before anything was restored.
        followed = links.wait_for(Option::is_some) => followed.is_ok(),
    }
}

/// Takes the API's port; it is served later.
async fn bind_api(addr: &str) -> anyhow::Result<TcpListener> {
    let bound = bind(addr).await;
    bound
        .with_context(|| format!("cannot init http server: cannot open http server: listen {addr}"))
}

/// Takes the proxy's port, if there is a proxy.
async fn bind_proxy(proxy: &config::Proxy) -> anyhow::Result<Option<TcpListener>> {
    if proxy.target.is_empty() {
        tracing::info!("no proxy target set, skipping proxy");
        return Ok(None);
    }
    let addr = &proxy.addr;
    let bound = bind(addr).await;
    bound.map(Some).with_context(|| {
        format!("cannot init proxy server: cannot open proxy server: listen {addr}")
    })
}

/// Takes a port. An empty host means every address, a name one of its own: of IPv4 if it has one, as
/// with Go, whatever the resolver gives first.
async fn bind(addr: &str) -> std::io::Result<TcpListener> {
    match addr.strip_prefix(':') {
        Some(port) => match TcpListener::bind(format!("[::]:{port}")).await {
            // A machine without IPv6.
            Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
                TcpListener::bind(format!("0.0.0.0:{port}")).await
            }
            bound => bound,
        },
        None => {
            let found: Vec<_> = lookup_host(addr).await?.collect();
            let first = found.iter().find(|found| found.is_ipv4()).or(found.first());
            let none =
                || std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
            TcpListener::bind(first.ok_or_else(none)?).await
        }
    }
}

fn proxy_options(settings: &Settings, metrics: &Metrics, security: &Security) -> proxy::Options {
    let Settings { config, environment, .. } = settings;
    let config::Proxy { target, db, passthrough, always_forward, .. } = config.proxy.clone();
    let databases = &config.lease.databases;
    proxy::Options {
        target,
        has_db: databases.is_empty() || databases.contains(&db),
        db,
        max_lag: config.proxy.max_lag,
        debug: config.proxy.debug,
        passthrough,
        always_forward,
        primary_wait: config.proxy.primary_redirect_timeout,
        timeouts: proxy::Timeouts {
            read: config.proxy.read_timeout,
            read_header: config.proxy.read_header_timeout,
            write: config.proxy.write_timeout,
            idle: config.proxy.idle_timeout,
        },
        way: if is_fly(environment) { Way::FlyReplay } else { Way::Forward },
        admission: if config.skip_sync { Admission::AtOnce } else { Admission::WhenReady },
        metrics: metrics.proxy.clone(),
        security: security.clone(),
    }
}

/// Where the proxy takes writes of other nodes: on the host at which they reach the API.
fn proxy_url(
    config: &Config,
    listener: &TcpListener,
    security: &Security,
) -> anyhow::Result<String> {
    let port = listener.local_addr().context("cannot init proxy server")?.port();
    let advertised = match config.lease.advertise_url.as_str() {
        "" => format!("http://{}", hostname(config)),
        url => url.to_owned(),
    };
    let api = Url::new(&advertised).with_context(|| format!("advertise {advertised:?}"))?;
    Ok(Url { scheme: scheme(security), port, ..api }.to_string())
}

/// How this node is spoken to.
fn scheme(security: &Security) -> Scheme {
    if security.has_tls() { Scheme::Https } else { Scheme::Http }
}

/// Whether this is a machine of Fly.io.
fn is_fly(environment: &Environment) -> bool {
    environment.get("FLY_APP_NAME").is_some_and(|name| !name.is_empty())
}

/// The URL as people type it: `localhost` for an empty host, and the real port.
fn shown_url(scheme: Scheme, addr: &str, bound: std::net::SocketAddr) -> String {
    let host = addr.rsplit_once(':').map_or(addr, |(host, _)| host);
    let host = if host.is_empty() { "localhost" } else { host };
    format!("{}://{host}:{}", scheme.as_str(), bound.port())
}

/// Becomes primary, also if just now there is no primary that could hand its lease over.
async fn promote(control: &Control) -> anyhow::Result<()> {
    tracing::info!("node is a candidate, automatically promoting to primary");
    let end = Instant::now() + limits::PROMOTE_WAIT;
    loop {
        match control.promote(Force::No).await {
            Ok(()) => return Ok(()),
            Err(PromoteError::NotEligible) => anyhow::bail!(PromoteError::NotEligible),
            Err(error) if Instant::now() >= end => {
                anyhow::bail!("timed out waiting for promotion: {error}")
            }
            Err(error) => tracing::debug!(%error, "promote"),
        }
        sleep(limits::PROMOTE_RETRY).await;
    }
}

fn leaser(
    config: &Config,
    environment: &Environment,
    port: u16,
    node_id: NodeId,
    security: &Security,
) -> anyhow::Result<Leaser> {
    let lease = &config.lease;
    if lease.kind == Some(LeaseKind::Consul) {
        return consul(config, environment, port, node_id, security);
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
    Ok(Leaser::Static { role, primary })
}

fn consul(
    config: &Config,
    environment: &Environment,
    port: u16,
    node_id: NodeId,
    security: &Security,
) -> anyhow::Result<Leaser> {
    let lease = &config.lease;
    let hostname = hostname(config);
    if hostname.is_empty() {
        anyhow::bail!("must specify a hostname for this node");
    }
    let advertise_url = match lease.advertise_url.as_str() {
        "" => format!("{}://{hostname}:{port}", scheme(security).as_str()),
        url => url.to_owned(),
    };
    Url::new(&advertise_url).with_context(|| {
        format!("lease.advertise-url is not a URL of this node: {advertise_url:?}")
    })?;
    let address = Address::new(&lease.consul.url, |name| environment.get(name))
        .context("lease.consul.url")?;
    tracing::info!("Using Consul to determine primary");
    tracing::info!(
        "initializing consul: key={} url={address} hostname={hostname} advertise-url={advertise_url}",
        lease.consul.key
    );
    let client = ConsulClient::new(address).context("lease.consul")?;
    let options = ConsulOptions {
        key: lease.consul.key.clone(),
        ttl: lease.consul.ttl.0,
        lock_delay: lease.consul.lock_delay.0,
        me: PrimaryInfo { hostname, advertise_url },
        node_id,
    };
    Ok(Leaser::Consul(Arc::new(Consul::new(client, options))))
}

/// What other nodes know this one by: the machine's name, also where `HOSTNAME` is another one.
fn hostname(config: &Config) -> String {
    match config.lease.hostname.as_str() {
        "" => machine_name().unwrap_or_default(),
        hostname => hostname.to_owned(),
    }
}

async fn open_engine(config: &Config, node_id: NodeId) -> anyhow::Result<Arc<Engine>> {
    let data = &config.data;
    let options = engine::Options {
        dir: data.dir.clone(),
        compression: if data.compress { Compression::Lz4 } else { Compression::None },
        retention: data.retention.unwrap_or_default(),
        retention_interval: data.retention_monitor_interval.unwrap_or_default(),
        retain: match config.backup.kind {
            BackupKind::None => Retain::Free,
            BackupKind::File | BackupKind::LitefsCloud => Retain::BackedUp,
        },
        strict_verify: config.strict_verify,
        node_id,
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
    check_places(&config.data.dir, &fuse.dir)?;
    threads::begin_with(fuse::settle_thread);
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
    tracing::info!("LiteFS mounted to: {}", config.fuse.dir.display());
    Ok(mounted)
}

/// The mount must not hide the databases from litefs itself, by whatever links it leads there.
fn check_places(data: &Path, mount: &Path) -> anyhow::Result<()> {
    let real_data = std::fs::canonicalize(data)
        .with_context(|| format!("look for data directory {}", data.display()))?;
    // One that is missing, or the mount of a process that is gone, is no link to anywhere.
    let real_mount = std::fs::canonicalize(mount).unwrap_or_else(|_| users::resolve(mount));
    let databases = DataDir::new(&real_data).databases();
    if real_data.starts_with(&real_mount) || real_mount.starts_with(databases) {
        anyhow::bail!(
            "fuse.dir {} is {}, and would hide the databases in data.dir {} from litefs",
            mount.display(),
            real_mount.display(),
            data.display()
        );
    }
    Ok(())
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
