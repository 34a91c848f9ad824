//! One `litefs mount` process in directories of its own, with a configuration file as a person
//! would write it. Dropped, it is gone and unmounted; if the test fails, its log is shown.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, Once};

use litefs::engine::layout::DbDir;
use ltx::Pos;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::program::{self, Limit};
use super::{image, wait};

/// What a node says when it is ready and has nothing to run.
pub const READY: &str = "waiting for signal";

/// What `fuse.passthrough` and `fuse.transport` are where a test does not say; `make test-transports`
/// tries all.
const PASSTHROUGH: &str = "LITEFS_TEST_PASSTHROUGH";
const TRANSPORT: &str = "LITEFS_TEST_TRANSPORT";

/// How many lines of a log are shown when a test fails.
const LOG_LINES: usize = 100;

/// Seconds after which a request to a mount counts as one that hangs. What requests wait for on purpose has a limit of
/// ten seconds or so (`limits.rs`), and a loaded machine may add to it; a test that waits gives up after thirty.
const ANSWER_MAX: u64 = 40;

/// What differs from one test to the other.
#[derive(Clone, Default)]
pub struct Settings {
    /// `fuse.passthrough`; empty for the default.
    pub passthrough: &'static str,
    /// `fuse.transport`; empty for the default.
    pub transport: &'static str,
    /// More keys of the section `fuse`, each with a leading comma.
    pub fuse: &'static str,
    /// More keys of the section `data`, each with a leading comma.
    pub data: &'static str,
    /// More keys of the section `http`, each with a leading comma; with `tls` the URL is `https`.
    pub http: &'static str,
    /// More keys of the section `lease`, each with a leading comma.
    pub lease: &'static str,
    /// More lines.
    pub lines: &'static str,
    /// More variables of its environment.
    pub environment: &'static [(&'static str, &'static str)],
}

/// Which node of a static cluster.
#[derive(Clone, Copy)]
pub enum Member<'a> {
    /// The primary.
    Primary,
    /// A replica of the primary at this URL.
    Replica(&'a str),
    /// A node of a cluster with a lease in Consul.
    Consul(Lease<'a>),
}

/// A lease in Consul, as one node has it in its configuration.
#[derive(Clone, Copy)]
pub struct Lease<'a> {
    /// Consul's URL, with or without a prefix.
    pub url: &'a str,
    /// The node's host name.
    pub hostname: &'a str,
    /// Where others reach it; its own address if this is empty.
    pub advertise: &'a str,
    /// Whether it may become primary.
    pub candidate: bool,
    /// How long its session lives.
    pub ttl: &'a str,
}

/// A process. One that does not answer would stop a test in a file call for good; with its process
/// the call fails.
struct Running {
    child: Mutex<Child>,
    _limit: Limit,
}

impl Running {
    fn new(child: Child) -> Running {
        Running { _limit: Limit::new(&child), child: Mutex::new(child) }
    }
}

/// A node, running or not.
pub struct Node {
    dir: tempfile::TempDir,
    address: String,
    scheme: &'static str,
    environment: &'static [(&'static str, &'static str)],
    /// How many files its process may open; none for as many as the tests' own.
    files_max: Option<u32>,
    child: Option<Running>,
    /// Where in the log the present run began.
    run_start: u64,
    /// Whether requests to its mount may hang, see [`ANSWER_MAX`].
    may_hang: bool,
}

impl Node {
    /// A node with its configuration, not started.
    pub fn new(settings: &Settings, member: Member<'_>) -> Node {
        let address = free_address();
        let (dir, environment) = (tempfile::tempdir().unwrap(), settings.environment);
        let scheme = if settings.http.contains("tls:") { "https" } else { "http" };
        let (child, files_max, run_start, may_hang) = (None, None, 0, false);
        let node =
            Node { dir, address, scheme, environment, files_max, child, run_start, may_hang };
        node.configure(settings, member);
        node
    }

    /// The test makes requests to its mount hang, so that is no failure.
    pub fn may_hang(&mut self) {
        self.may_hang = true;
    }

    /// Lets its process open so many files, from its next start on.
    pub fn limit_files(&mut self, count: u32) {
        self.files_max = Some(count);
    }

    /// A primary, ready.
    pub fn primary(settings: &Settings) -> Node {
        let mut node = Node::new(settings, Member::Primary);
        node.start();
        node
    }

    /// Writes the configuration, for the next start.
    pub fn configure(&self, settings: &Settings, member: Member<'_>) {
        let Settings { passthrough, transport, fuse, data, http, lease, lines, .. } = settings;
        let fixed = |candidate: bool, primary: &str| {
            format!(
                "type: static, hostname: primary, advertise-url: '{primary}', candidate: {candidate}"
            )
        };
        let member = match member {
            Member::Primary => fixed(true, &self.url()),
            Member::Replica(url) => fixed(false, url),
            Member::Consul(Lease { url, hostname, advertise, candidate, ttl }) => {
                let advertise =
                    if advertise.is_empty() { self.url() } else { advertise.to_owned() };
                format!(
                    "type: consul, hostname: {hostname}, advertise-url: '{advertise}', \
                     candidate: {candidate}, consul: {{url: '{url}', key: test/lease, ttl: {ttl}}}"
                )
            }
        };
        let (root, address) = (self.dir.path().display(), &self.address);
        let chosen = |variable| std::env::var(variable).unwrap_or_else(|_| "auto".to_owned());
        // Tests that name a passthrough are about it.
        let passthrough = match *passthrough {
            "" => chosen(PASSTHROUGH),
            word => word.to_owned(),
        };
        let transport = match *transport {
            "" | "auto" => chosen(TRANSPORT),
            word => word.to_owned(),
        };
        offer_uring();
        let config = format!(
            "fuse: {{dir: {root}/mnt, passthrough: {passthrough}, transport: {transport}{fuse}}}\n\
             data: {{dir: {root}/data{data}}}\n\
             http: {{addr: '{address}'{http}}}\n\
             lease: {{{member}, reconnect-delay: 100ms{lease}}}\n\
             {lines}\n"
        );
        fs::write(self.dir.path().join("litefs.yml"), config).unwrap();
    }

    /// Starts the process and waits until it is ready.
    #[track_caller]
    pub fn start(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Starts the process.
    #[track_caller]
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "is running already");
        self.run_start = fs::metadata(self.log_path()).map_or(0, |meta| meta.len());
        let log = OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = match self.files_max {
            None => Command::new(program::litefs()),
            Some(count) => {
                let mut command = Command::new("prlimit");
                command.arg(format!("--nofile={count}")).arg(program::litefs());
                command
            }
        };
        command.arg("mount").arg("-config").arg(self.dir.path().join("litefs.yml"));
        command.envs(self.environment.iter().copied());
        command
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(File::open("/dev/null").unwrap());
        self.child = Some(Running::new(command.spawn().unwrap()));
    }

    /// Waits until the node is primary, or has what its primary has.
    #[track_caller]
    pub fn wait_ready(&self) {
        self.wait_for_log(READY);
    }

    /// Ends the process as a service manager would.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        let child = self.child.take().expect("is running").child;
        let ended = wait::until_or(
            || format!("end of the node; log:\n{}", self.log()),
            || child.lock().unwrap().try_wait().unwrap(),
        );
        // One that is in use stays, and the node complains.
        assert!(!ended.success() || !is_mounted(&self.mount()), "the mount is still there");
        ended
    }

    /// Ends the process as a crash would.
    pub fn kill(&mut self) {
        if let Some(Running { child, .. }) = self.child.take() {
            let mut child = child.into_inner().unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// The running process.
    pub fn pid(&self) -> Pid {
        let running = self.child.as_ref().expect("is running");
        Pid::from_raw(running.child.lock().unwrap().id().cast_signed())
    }

    /// Whether the process was started and not ended by us.
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// The URL of its API.
    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// Host and port of its API.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The mount.
    pub fn mount(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// A file of the mount.
    pub fn file(&self, name: &str) -> PathBuf {
        self.mount().join(name)
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A place for a test's own files.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory of a database.
    pub fn db_dir(&self, name: &str) -> DbDir {
        image::directory(&self.data(), name)
    }

    /// The databases in the mount.
    pub fn databases(&self) -> Vec<String> {
        let is_database = |name: &String| {
            let suffixes = ["-journal", "-wal", "-shm", "-pos", "-lock"];
            !name.starts_with('.') && !suffixes.iter().any(|suffix| name.ends_with(suffix))
        };
        let names = fs::read_dir(self.mount()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(is_database).collect();
        names.sort();
        names
    }

    /// Where a database stands; zero if there is none.
    pub fn pos(&self, name: &str) -> Pos {
        let text = fs::read_to_string(self.file(&format!("{name}-pos"))).unwrap_or_default();
        text.trim_end().parse().unwrap_or(Pos::ZERO)
    }

    /// Waits until a database stands at `pos`.
    #[track_caller]
    pub fn wait_for_pos(&self, name: &str, pos: Pos) {
        wait::until_or(
            || format!("{name} at {pos}; it stands at {}", self.pos(name)),
            || (self.pos(name) == pos).then_some(()),
        );
    }

    /// What the node has said since it was started.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log_path()).unwrap_or_default();
        let run = bytes.get(self.run_start as usize..).unwrap_or_default();
        String::from_utf8_lossy(run).into_owned()
    }

    /// What the node has said since its first start.
    pub fn whole_log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// How many lines of the log since the start contain `text`.
    pub fn log_count(&self, text: &str) -> usize {
        self.log().lines().filter(|line| line.contains(text)).count()
    }

    /// Waits until the log contains `text`.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        wait::until_or(
            || format!("{text:?} in the log:\n{}", self.log()),
            || {
                let found = self.log().contains(text);
                let running = self.child.as_ref().expect("is running");
                let ended = running.child.lock().unwrap().try_wait().unwrap();
                assert!(found || ended.is_none(), "the node has ended:\n{}", self.log());
                found.then_some(())
            },
        );
    }

    /// What the API answers to a GET; an answer other than 200 is waited over.
    #[track_caller]
    pub fn get(&self, path: &str) -> String {
        wait::until_or(|| format!("{path} of {}", self.address), || self.try_get(path))
    }

    /// What the API answers to a GET, if that is 200.
    pub fn try_get(&self, path: &str) -> Option<String> {
        let mut socket = TcpStream::connect(&self.address).ok()?;
        socket.set_read_timeout(Some(wait::DEADLINE)).unwrap();
        write!(socket, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.address).ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.lines().next()?.contains(" 200 ").then(|| body.to_owned())
    }

    /// A metric, by the beginning of its line; zero if there is none.
    #[track_caller]
    pub fn metric(&self, line: &str) -> f64 {
        let text = self.get("/metrics");
        let line = text.lines().find_map(|found| found.strip_prefix(line));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    /// Runs a command of the command line against this node; `-url` is added.
    pub fn litefs(&self, command: &str, arguments: &[&str]) -> Output {
        let mut process = Command::new(program::litefs());
        process.arg(command).args(["-url", &self.url()]).args(arguments);
        program::output(process.current_dir(self.dir.path())).unwrap()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        let mount = self.mount();
        // A dead one may be below.
        for _ in 0..3 {
            if is_mounted(&mount) {
                let _ = Command::new("umount").arg("-l").arg(&mount).status();
            }
        }
        let log = self.whole_log();
        if std::thread::panicking() {
            let last = log.lines().skip(log.lines().count().saturating_sub(LOG_LINES));
            eprintln!("--- log of {}\n{}", self.url(), last.collect::<Vec<_>>().join("\n"));
        } else if !self.may_hang {
            let hanging = log.lines().find(|line| is_hanging(line));
            assert!(hanging.is_none(), "{}: {}", self.url(), hanging.unwrap_or_default());
        }
    }
}

/// Whether a line of a log names a request that was not answered for [`ANSWER_MAX`].
fn is_hanging(line: &str) -> bool {
    let seconds = |word: &str| word.strip_prefix("seconds=")?.parse().ok();
    line.contains("is not answered yet")
        && line.split([' ', '"']).filter_map(seconds).any(|age: u64| age >= ANSWER_MAX)
}

#[test]
fn a_request_that_hangs_fails_a_test() {
    let line = "level=WARN msg=\"fuse request is not answered yet\" request=SETLK seconds=";
    assert!(is_hanging(&format!("{line}40")) && is_hanging(&format!("{line}80 file=a")));
    assert!(!is_hanging(&format!("{line}20")) && !is_hanging("seconds=40"));
}

/// Has the kernel offer io_uring, so that `auto` takes it. Where that is impossible, `auto` has to do
/// without, and a node that is to use nothing else says why it does not start.
fn offer_uring() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = fuse::enable_uring() {
            eprintln!("tests of io_uring will fail: {error}");
        }
    });
}

/// Whether something is mounted there.
pub fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let dir = dir.to_str().unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(dir))
}

/// An address on loopback whose port is free, outside the range that the kernel gives to clients:
/// a node that is started again must find it free again.
pub fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (std::process::id() % 200) as u16 * 100;
    wait::until("a free port", || {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed) % 2000;
        let address = format!("127.0.0.1:{port}");
        TcpListener::bind(&address).is_ok().then_some(address)
    })
}
