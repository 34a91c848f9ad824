//! One `litefs mount` process of the built program, in directories of its own, with a configuration
//! file. Dropped, it is gone and unmounted.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ltx::Pos;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Plan, Session};

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_litefs");

/// What a node says when it has nothing more to wait for.
const READY: &str = "waiting for signal";

/// The longest wait for a node: a large snapshot on a slow disk.
const WAIT_MAX: Duration = Duration::from_secs(600);

/// Time between two looks at a node.
const LOOK_PERIOD: Duration = Duration::from_micros(500);

/// A node, running or not.
pub struct Node {
    dir: PathBuf,
    address: String,
    session: Session,
    child: Option<Child>,
}

impl Node {
    /// A primary in `dir`, not started.
    pub fn primary(dir: PathBuf, plan: &Plan) -> Result<Node> {
        let address = free_address()?;
        let url = format!("http://{address}");
        Node::configured(dir, plan, address, "true", &url)
    }

    /// A replica of `primary` in `dir`, not started.
    pub fn replica(dir: PathBuf, plan: &Plan, primary: &Node) -> Result<Node> {
        let url = format!("http://{}", primary.address);
        Node::configured(dir, plan, free_address()?, "false", &url)
    }

    fn configured(
        dir: PathBuf,
        plan: &Plan,
        address: String,
        candidate: &str,
        primary: &str,
    ) -> Result<Node> {
        fs::create_dir_all(&dir).context("make directory of node")?;
        let (root, Plan { transport, passthrough, .. }) = (dir.display(), plan);
        let config = format!(
            "fuse: {{dir: {root}/mnt, transport: {transport}, passthrough: {passthrough}}}\n\
             data: {{dir: {root}/data}}\n\
             http: {{addr: '{address}'}}\n\
             lease: {{type: static, hostname: primary, advertise-url: '{primary}', \
             candidate: {candidate}, reconnect-delay: 100ms}}\n"
        );
        fs::write(dir.join("litefs.yml"), config).context("write configuration")?;
        Ok(Node { dir, address, session: plan.session, child: None })
    }

    /// Starts it and waits until it is primary, or has what its primary has.
    pub fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait("ready", |node| node.log().contains(READY).then_some(()))
    }

    /// Starts the process.
    pub fn spawn(&mut self) -> Result<()> {
        let log = File::create(self.dir.join("log")).context("open log")?;
        let mut command = match self.session {
            Session::Same => Command::new(PROGRAM),
            // It becomes the program: a child of ours leads no group of processes.
            Session::Own => {
                let mut command = Command::new("setsid");
                command.arg(PROGRAM);
                command
            }
        };
        command.arg("mount").arg("-config").arg(self.dir.join("litefs.yml"));
        command.stdout(log.try_clone()?).stderr(log).stdin(File::open("/dev/null")?);
        self.child = Some(command.spawn().context("start litefs")?);
        Ok(())
    }

    /// Ends it as a service manager would.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let Some(mut child) = self.child.take() else { bail!("node is not running") };
        let status = child.wait().context("wait for node")?;
        anyhow::ensure!(status.success(), "node ended with {status}:\n{}", self.log());
        Ok(())
    }

    /// Sends a signal to it.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid()?, signal).with_context(|| format!("send {signal}"))
    }

    /// Bytes of its resident memory.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()).context("find VmRSS")?;
        Ok(kib.parse::<u64>()? * 1024)
    }

    /// Where the database `name` stands, once the mount is there and says it.
    pub fn pos(&self, name: &str) -> Option<Pos> {
        let text = fs::read_to_string(self.mount().join(format!("{name}-pos"))).ok()?;
        text.trim_end().parse().ok()
    }

    /// Waits until the database `name` stands at `pos`; without one, anywhere.
    pub fn wait_for_pos(&self, name: &str, pos: Option<Pos>) -> Result<()> {
        self.wait("position", |node| {
            let found = node.pos(name)?;
            pos.is_none_or(|pos| pos == found).then_some(())
        })
    }

    /// Looks at the node until `look` finds something.
    pub fn wait<T>(&self, what: &str, look: impl Fn(&Node) -> Option<T>) -> Result<T> {
        let end = Instant::now() + WAIT_MAX;
        loop {
            if let Some(found) = look(self) {
                return Ok(found);
            }
            if Instant::now() > end {
                bail!("waited in vain: {what}; log:\n{}", self.log());
            }
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// The mount.
    pub fn mount(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// What it has said since it was started.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn pid(&self) -> Result<Pid> {
        let child = self.child.as_ref().context("node is not running")?;
        Ok(Pid::from_raw(child.id().cast_signed()))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if is_mounted(&self.mount()) {
            let _ = Command::new("umount").arg("-l").arg(self.mount()).status();
        }
    }
}

fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(1).map(Path::new) == Some(dir))
}

/// An address on loopback whose port is free, outside the range that the kernel gives to clients: a
/// node that is started again must find it free again.
fn free_address() -> Result<String> {
    let first = 11_000 + (std::process::id() % 1000) as u16 * 10;
    let mut addresses = (first..first + 5000).map(|port| format!("127.0.0.1:{port}"));
    addresses.find(|address| TcpListener::bind(address).is_ok()).context("find a free port")
}
