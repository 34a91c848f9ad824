//! Mounting and unmounting: options in, a [`Mount`] out that serves until it ends.
//!
//! Steps of [`mount`]: see that the mount point can be had; open the device and mount it, in the place of
//! a mount whose process is gone (root by mount(2), others through fusermount3); answer INIT; see whether backing
//! files work; tell the volume; start the workers. Nothing reaches the volume before
//! [`Volume::mounted`] has returned.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::SysconfVar;

use crate::dev::{self, Buffer, Channel, Source};
use crate::disk::{Disk, Workers};
use crate::dispatch::{Session, Trace};
use crate::error::Error;
use crate::init::{self, Agreed, Ready};
use crate::interrupt::Waits;
use crate::mount_point;
use crate::notify::{Notifier, Shared};
use crate::passthrough::{self, Ways};
use crate::reply::Responder;
use crate::request::{Operation, Parts};
use crate::uring::{self, Offer, Rings};
use crate::volume::Volume;
use crate::watch::Watch;
use crate::{Kernel, abi};

/// Whether files may be served by the kernel from their backing files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PassthroughMode {
    /// Where the kernel can do it and lets this process.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// How requests travel between the kernel and this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// Over io_uring where the kernel offers it and lets this process, else over `/dev/fuse`.
    #[default]
    Auto,
    /// Over io_uring, or not at all. See [`crate::enable_uring`].
    Uring,
    /// By read(2) and write(2) on `/dev/fuse`.
    Dev,
}

/// What to mount where.
#[derive(Debug)]
pub struct MountOptions {
    /// The mount point, an existing directory.
    pub dir: PathBuf,
    /// Whether other users than the one who mounts may use it.
    pub allow_other: bool,
    /// Whether backing files are used.
    pub passthrough: PassthroughMode,
    /// A regular file on the file system of the backing files, on which passthrough is tried.
    pub probe: File,
    /// Leave a mount of a process that is gone in place, and fail.
    pub skip_unmount_stale: bool,
    /// Log each request at level debug.
    pub debug: bool,
    /// How requests travel.
    pub transport: Transport,
    /// Have the kernel offer io_uring to all mounts of this machine first; needs root.
    pub enable_uring: bool,
    /// How many workers read `/dev/fuse`; zero for the default. Over io_uring it is one.
    pub workers: usize,
}

impl MountOptions {
    /// The defaults: one user, passthrough if it works, stale mounts freed.
    pub fn new(dir: impl Into<PathBuf>, probe: File) -> MountOptions {
        MountOptions {
            dir: dir.into(),
            allow_other: false,
            passthrough: PassthroughMode::Auto,
            probe,
            skip_unmount_stale: false,
            debug: false,
            transport: Transport::Auto,
            enable_uring: false,
            workers: 0,
        }
    }
}

/// A mounted volume. Dropped, it is unmounted. If it is in use it stays where it is, dead as soon as the
/// process ends: taken out of sight, it would leave a plain directory to applications that are just
/// opening a database, and what they make and write there would be lost.
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
    transport: Transport,
    notifier: Notifier,
    end: Arc<End>,
}

/// Workers without a number in the options. A request that the kernel sends holds one only while
/// the volume computes; waiting is done without a thread.
const WORKERS: usize = 2;

/// How long the workers may take to see that their mount is gone. They see it at once, unless
/// another mount namespace still has it.
const UNMOUNT_WAIT: Duration = Duration::from_secs(5);

/// Mounts `volume` as `options` say. The log says in one line which transport it is, and why if it
/// is not the fastest one.
pub fn mount<V: Volume>(volume: Arc<V>, options: MountOptions) -> Result<Mount, Error> {
    let dir = mount_point::prepare(&options.dir, options.skip_unmount_stale)?;
    let over_device = || attempt(&volume, &options, &dir, None);
    match options.transport {
        Transport::Dev => {
            let mount = over_device()?;
            tracing::info!("fuse requests come over /dev/fuse");
            Ok(mount)
        }
        Transport::Uring => over_rings(&volume, &options, &dir),
        Transport::Auto => match over_rings(&volume, &options, &dir) {
            Err(why @ (Error::UringMissing | Error::UringOff | Error::Uring { .. })) => {
                let mount = over_device()?;
                log_device(&why);
                Ok(mount)
            }
            other => other,
        },
    }
}

/// Mounts with rings, which are made before, since the mount could not do without them.
fn over_rings<V: Volume>(
    volume: &Arc<V>,
    options: &MountOptions,
    dir: &Path,
) -> Result<Mount, Error> {
    if options.enable_uring {
        uring::enable_uring()?;
    }
    match Offer::of_kernel() {
        Offer::Missing => return Err(Error::UringMissing),
        Offer::Off => return Err(Error::UringOff),
        Offer::On => {}
    }
    let rings = Rings::new().map_err(|source| Error::Uring { doing: "make rings", source })?;
    let mount = attempt(volume, options, dir, Some(rings))?;
    tracing::info!("fuse requests come over io_uring");
    Ok(mount)
}

/// Says why the slower way was taken, as a warning if a person has to do with it.
fn log_device(why: &Error) {
    match why {
        Error::Uring { source, .. } => tracing::warn!(
            error = %source,
            "fuse requests come over /dev/fuse, which is slower than io_uring: {why}"
        ),
        _ => tracing::info!(
            "fuse requests come over /dev/fuse, which is slower than io_uring: {why}"
        ),
    }
}

fn attempt<V: Volume>(
    volume: &Arc<V>,
    options: &MountOptions,
    dir: &Path,
    rings: Option<Rings>,
) -> Result<Mount, Error> {
    let device = mount_point::mount(dir, options.allow_other)?;
    let mut guard = UnmountOnError { dir: Some(dir) };
    let mount = start(volume.clone(), options, dir, device, rings)?;
    guard.dir = None;
    Ok(mount)
}

/// Takes a half-made mount away again.
struct UnmountOnError<'a> {
    dir: Option<&'a Path>,
}

impl Drop for UnmountOnError<'_> {
    fn drop(&mut self) {
        if let Some(dir) = self.dir {
            let _ = mount_point::detach(dir);
        }
    }
}

fn start<V: Volume>(
    volume: Arc<V>,
    options: &MountOptions,
    dir: &Path,
    device: OwnedFd,
    rings: Option<Rings>,
) -> Result<Mount, Error> {
    let channel = Arc::new(Channel::new(device));
    let transport = if rings.is_some() { Transport::Uring } else { Transport::Dev };
    let page = nix::unistd::sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    let page = page.and_then(|page| usize::try_from(page).ok()).unwrap_or(4096);
    let ready = Ready { passthrough: options.passthrough, transport, page };
    let agreed = handshake(&channel, ready)?;
    let passthrough = agreed.passthrough && try_backing(&channel, &options.probe);
    let workers_of_rings = rings.as_ref().map(Rings::workers);
    let rings = match rings {
        Some(rings) if agreed.uring => rings.register(&channel),
        Some(_) => return Err(Error::UringMissing),
        None => Ok(Vec::new()),
    };
    let rings = rings.map_err(|source| Error::Uring { doing: "register rings", source })?;

    let (notifier, posts) = Notifier::connected(channel.clone());
    let ways = Ways::new(channel.clone(), passthrough);
    let trace = if options.debug { Trace::On } else { Trace::Off };
    let sources = sources(&channel, transport, options.workers);
    let workers_of_device = if sources.len() > 1 { Workers::Alike } else { Workers::Alone };
    let disk = Disk::start(workers_of_rings.unwrap_or(workers_of_device))
        .map_err(|source| Error::Session { doing: "start fuse disk threads", source })?;
    let session = Arc::new(Session::new(volume.clone(), ways, disk, trace));
    volume.mounted(Kernel { passthrough, notifier: notifier.clone() });

    let workers = sources.len() + rings.len();
    let end = Arc::new(End::new(workers, posts.clone(), &session));
    spawn("fuse-notify", move || posts.carry_out())?;
    let repeater = session.clone();
    spawn("fuse-interrupt", move || repeater.waits.clone().repeat(repeater.volume.clone()))?;
    let watching = session.clone();
    spawn("fuse-watch", move || watching.watch.run(|stuck| watching.report(stuck)))?;
    let worker = Worker { session, end: end.clone(), dir: dir.to_owned() };
    for (index, source) in sources.into_iter().enumerate() {
        let worker = worker.clone();
        let work = move || worker.work(|session| dev::work(session, source));
        spawn(&format!("fuse-{index}"), work)?;
    }
    for ring in rings {
        let worker = worker.clone();
        let serve = Box::new(move |runner| worker.work(|session| uring::work(session, runner)));
        // A thread that is gone has been counted as a worker all the same: the mount cannot be.
        let gone = |_| Error::Session { doing: "start fuse ring", source: Errno::EPIPE };
        ring.send(serve).map_err(gone)?;
    }
    Ok(Mount { dir: dir.to_owned(), transport, notifier, end })
}

/// Who serves requests.
struct Worker<V: Volume> {
    session: Arc<Session<V>>,
    end: Arc<End>,
    dir: PathBuf,
}

impl<V: Volume> Clone for Worker<V> {
    fn clone(&self) -> Self {
        let Worker { session, end, dir } = self;
        Worker { session: session.clone(), end: end.clone(), dir: dir.clone() }
    }
}

impl<V: Volume> Worker<V> {
    /// Serves until the mount ends. If that fails the mount ends: whom this one served would wait for ever.
    fn work(self, serve: impl FnOnce(&Session<V>) -> Result<(), Error>) {
        let served = catch_unwind(AssertUnwindSafe(|| serve(&self.session)));
        let panicked = |_| Err(Error::Session { doing: "panic in serve", source: Errno::EIO });
        if let Err(error) = served.unwrap_or_else(panicked) {
            tracing::error!(%error, dir = %self.dir.display(), "a fuse worker ended, and so does the mount");
            let is_first = !self.end.is_cut_off.swap(true, Ordering::Relaxed);
            if is_first && let Err(errno) = mount_point::cut_off(&self.dir) {
                tracing::error!(%errno, "the mount stays, and calls may wait for ever: end this process");
            }
        }
        self.end.one_less(|| self.session.end());
    }
}

/// Where each worker of `/dev/fuse` takes its requests from. Beside rings little comes this way.
fn sources(channel: &Arc<Channel>, transport: Transport, workers: usize) -> Vec<Source> {
    match (transport, workers) {
        (Transport::Uring, _) => vec![Source::waiting(channel)],
        (_, 0) => (0..WORKERS).map(|_| Source::new(channel)).collect(),
        (_, workers) => (0..workers).map(|_| Source::new(channel)).collect(),
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(run);
    spawned.map(drop).map_err(|error| Error::Session {
        doing: "start fuse thread",
        source: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)),
    })
}

/// Answers INIT; what both sides have.
fn handshake(channel: &Arc<Channel>, ready: Ready) -> Result<Agreed, Error> {
    let failed = |source| Error::Session { doing: "read fuse init", source };
    let mut buffer = Buffer::new();
    let len = loop {
        match channel.receive(buffer.room()) {
            Err(Errno::EINTR) => {}
            other => break other.map_err(failed)?,
        }
    };
    let parts = Parts::of_message(&buffer.room()[..len]).map_err(|_| failed(Errno::EPROTO))?;
    let Ok(Operation::Init(offer)) = parts.decode() else {
        return Err(failed(Errno::EPROTO));
    };
    let responder = Responder::new(channel.clone(), parts.header.unique);
    let agreed = init::agree(&offer, ready)?;
    tracing::debug!(
        minor = offer.minor,
        flags = agreed.answer.flags,
        flags2 = agreed.answer.flags2,
        "fuse session"
    );
    responder.value::<abi::InitOut>(&agreed.answer);
    Ok(agreed)
}

fn try_backing(channel: &Channel, file: &File) -> bool {
    match passthrough::probe(channel, file) {
        Ok(()) => true,
        Err(error) => {
            tracing::info!(%error, "fuse passthrough not available");
            false
        }
    }
}

impl Mount {
    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How requests travel: over io_uring, or over the device.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// How to tell the kernel of changes.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// Has `call` called once when the mount has ended, whoever unmounted it; at once if it has.
    /// A second one replaces the first. The thread that calls it is a worker about to end.
    pub fn on_end(&self, call: impl FnOnce() + Send + 'static) {
        self.end.on_end(Box::new(call));
    }

    /// Waits until the mount has ended.
    pub fn wait(&self) {
        self.end.wait();
    }

    /// Unmounts, and waits until the last request is served. While somebody has a file open this
    /// fails with [`Error::Busy`], and the mount goes on.
    pub fn unmount(&self) -> Result<(), Error> {
        if self.end.is_over() {
            return mount_point::detach_if_gone(&self.dir);
        }
        mount_point::unmount(&self.dir)?;
        if self.end.wait_at_most(UNMOUNT_WAIT).is_err() {
            tracing::warn!(dir = %self.dir.display(), "still mounted in another namespace");
        }
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = match self.end.is_over() {
            true => mount_point::detach_if_gone(&self.dir),
            false => mount_point::unmount(&self.dir),
        };
        match unmounted {
            Ok(()) => {}
            Err(Error::Busy { dir }) => tracing::warn!(
                dir = %dir.display(),
                "the mount is in use and stays, dead, until the next start or `umount -l`"
            ),
            Err(error) => tracing::error!(%error, "unmount"),
        }
    }
}

/// How many workers still serve, and whom to tell when none does.
struct End {
    state: Mutex<Serving>,
    changed: Condvar,
    posts: Arc<Shared>,
    waits: Arc<Waits>,
    watch: Arc<Watch>,
    /// A worker failed, and so the mount was cut off.
    is_cut_off: AtomicBool,
}

struct Serving {
    workers: usize,
    on_end: Option<Box<dyn FnOnce() + Send>>,
}

impl End {
    fn new<V: Volume>(workers: usize, posts: Arc<Shared>, session: &Session<V>) -> End {
        let state = Mutex::new(Serving { workers, on_end: None });
        let (waits, watch) = (session.waits.clone(), session.watch.clone());
        let is_cut_off = AtomicBool::new(false);
        End { state, changed: Condvar::new(), posts, waits, watch, is_cut_off }
    }

    /// A worker ends; the last one does what is left.
    fn one_less(&self, last: impl FnOnce()) {
        let mut state = self.state.lock().unwrap();
        if state.workers > 1 {
            state.workers -= 1;
            return;
        }
        drop(state);
        last();
        let mut state = self.state.lock().unwrap();
        state.workers = 0;
        let on_end = state.on_end.take();
        drop(state);
        self.changed.notify_all();
        self.posts.stop();
        self.waits.stop();
        self.watch.stop();
        if let Some(call) = on_end {
            call();
        }
    }

    fn on_end(&self, call: Box<dyn FnOnce() + Send>) {
        let mut state = self.state.lock().unwrap();
        if state.workers > 0 {
            state.on_end = Some(call);
            return;
        }
        drop(state);
        call();
    }

    fn is_over(&self) -> bool {
        self.state.lock().unwrap().workers == 0
    }

    /// An error if it has not ended by then.
    fn wait_at_most(&self, limit: Duration) -> Result<(), ()> {
        let state = self.state.lock().unwrap();
        let serving = |state: &mut Serving| state.workers > 0;
        let (state, _) = self.changed.wait_timeout_while(state, limit, serving).unwrap();
        if state.workers > 0 { Err(()) } else { Ok(()) }
    }

    fn wait(&self) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| state.workers > 0).unwrap());
    }
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("End").field("workers", &self.state.lock().unwrap().workers).finish()
    }
}
