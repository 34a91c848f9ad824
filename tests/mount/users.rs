//! Who may use a mount: the user of litefs, others if the configuration lets them; and a user who is not root
//! and has a mount of his own.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_case::test_matrix;

use super::DB;
use crate::support::node::{Member, Node, Settings, free_address};
use crate::support::program::{self, Limit};
use crate::support::{sqlite, wait};

/// A user without rights, as Debian numbers it.
const NOBODY: u32 = 65534;

/// The directory of a test, which only its user can enter, is opened for others.
fn let_others_in(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs a program as [`NOBODY`].
fn as_nobody(words: &[&str]) -> Output {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).uid(NOBODY).gid(NOBODY).current_dir("/");
    program::output(&mut command).unwrap()
}

/// As people type it: nothing waits for locks.
fn sql_as_nobody(file: &Path, sql: &str) -> Result<String, String> {
    let Output { status, stdout, stderr } = as_nobody(&["sqlite3", file.to_str().unwrap(), sql]);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if status.success() { Ok(text(&stdout)) } else { Err(text(&stderr)) }
}

#[test]
fn another_user_is_refused() {
    let node = Node::primary(&Settings::default());
    let_others_in(&node.scratch(""));
    let file = node.file(DB);
    sqlite::run(&file, "create table t(x)");
    let listed = as_nobody(&["ls", node.mount().to_str().unwrap()]);
    let complaint = String::from_utf8_lossy(&listed.stderr).into_owned();
    assert!(!listed.status.success() && complaint.contains("Permission denied"), "{complaint}");
    let complaint = sql_as_nobody(&file, "select * from t").unwrap_err();
    assert!(complaint.contains("unable to open database"), "{complaint}");
    assert_eq!(sqlite::run(&file, "insert into t values (1); select x from t"), "1");
}

/// Modes are shown as LiteFS shows them and refuse nobody: a role refuses.
#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn another_user_works_where_all_are_allowed(mode: &str, passthrough: &'static str) {
    let settings = Settings { passthrough, fuse: ", allow-other: true", ..Settings::default() };
    let primary = Node::primary(&settings);
    let mut replica = Node::new(&settings, Member::Replica(&primary.url()));
    replica.start();
    for node in [&primary, &replica] {
        let_others_in(&node.scratch(""));
    }
    // Everything is made by the one, and used by the other.
    let file = primary.file(DB);
    let made = format!("pragma journal_mode={mode}; create table t(x); insert into t values (1)");
    assert_eq!(sql_as_nobody(&file, &made).as_deref(), Ok(mode));
    let mut root = crate::support::shell::Shell::open(&file);
    root.run("insert into t values (2)");
    assert_eq!(
        sql_as_nobody(&file, "insert into t values (3); select sum(x) from t").as_deref(),
        Ok("6")
    );
    replica.wait_for_pos(DB, primary.pos(DB));
    let theirs = replica.file(DB);
    assert_eq!(sql_as_nobody(&theirs, "select sum(x) from t").as_deref(), Ok("6"));
    let refused = as_nobody(&["sqlite3", theirs.to_str().unwrap(), "insert into t values (4)"]);
    assert!(!refused.status.success(), "a write on a replica was not refused");

    let me = nix::unistd::geteuid().as_raw();
    let group = nix::unistd::getegid().as_raw();
    let check = |node: &Node, name: &str, mode: u32| {
        let meta = fs::metadata(node.file(name)).unwrap();
        let seen = (meta.uid(), meta.gid(), meta.mode() & 0o7777);
        assert_eq!(seen, (me, group, mode), "{name:?} of {}: {:o}", node.url(), seen.2);
    };
    for (name, on_primary, on_replica) in
        [("", 0o777, 0o555), (DB, 0o666, 0o444), ("app.db-pos", 0o666, 0o666)]
    {
        check(&primary, name, on_primary);
        check(&replica, name, on_replica);
    }
    if mode == "wal" {
        check(&primary, "app.db-wal", 0o666);
        check(&primary, "app.db-shm", 0o666);
    }
    check(&replica, ".primary", 0o444);
    let mask = umask();
    for (path, mode) in [(DB, 0o777), ("app.db/database", 0o666), ("app.db/ltx", 0o777)] {
        let meta = fs::metadata(primary.data().join("dbs").join(path)).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7777), (me, mode & !mask), "{path}");
    }
}

/// The mask of this process, which its nodes have too.
fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("Umask:")).unwrap();
    u32::from_str_radix(mask.trim(), 8).unwrap()
}

/// Runs a program in a mount namespace where anybody may open the device, as udev has it; in a container root
/// alone may.
const AS_NOBODY: &str = "cp -a /dev/fuse fuse && chmod 666 fuse && mount --bind fuse /dev/fuse && \
                         exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";

/// A litefs that [`NOBODY`] runs, with a command on it. Its mount is in a namespace of its own and goes with it.
struct OfNobody {
    dir: tempfile::TempDir,
    child: Child,
    _limit: Limit,
}

impl OfNobody {
    fn start(fuse: &str, script: &str) -> OfNobody {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let_others_in(root);
        chown(root, Some(NOBODY), Some(NOBODY)).unwrap();
        // The program may stand where others cannot reach it.
        let program = root.join("litefs");
        let built = program::litefs();
        if fs::hard_link(built, &program).is_err() {
            fs::copy(built, &program).unwrap();
        }
        let (shown, address) = (root.display(), free_address());
        let config = format!(
            "fuse: {{dir: {shown}/mnt{fuse}}}\ndata: {{dir: {shown}/data}}\nhttp: {{addr: '{address}'}}\n\
             lease: {{type: static, hostname: a, advertise-url: 'http://{address}'}}\n"
        );
        fs::write(root.join("litefs.yml"), config).unwrap();
        let log = fs::File::create(root.join("log")).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", AS_NOBODY, "sh"]).arg(program);
        command.args(["mount", "-config", "litefs.yml", "--", "sh", "-c", script]);
        command.current_dir(root).env("HOME", root);
        command.stdin(std::process::Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap();
        OfNobody { _limit: Limit::new(&child), dir, child }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Waits for a file, or for the end of litefs.
    #[track_caller]
    fn wait_for_file(&mut self, name: &str) {
        let path = self.path(name);
        wait::until_true(name, || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() || path.exists(), "{ended:?}\n{}", self.log());
            path.exists()
        });
    }

    #[track_caller]
    fn end(&mut self) -> Option<i32> {
        wait::until("the end of litefs", || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for OfNobody {
    fn drop(&mut self) {
        // After a failed test; after a good one there is nothing left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn who_is_not_root_mounts_too() {
    let script = "sqlite3 mnt/wal.db 'pragma journal_mode=wal; create table t(x); insert into t values (7)' && \
                  sqlite3 mnt/app.db 'create table t(x); insert into t values (8)' && \
                  stat -c '%u %g %a' mnt/app.db >seen && mv seen up && exec tail -f /dev/null";
    let mut node = OfNobody::start("", script);
    node.wait_for_file("up");
    assert_eq!(fs::read_to_string(node.path("up")).unwrap(), "65534 65534 666\n");
    // Not even root.
    let mut root = Command::new("nsenter");
    root.arg(format!("--target={}", node.child.id())).args(["--mount", "ls"]).arg(node.path("mnt"));
    let refused = String::from_utf8_lossy(&program::output(&mut root).unwrap().stderr).into_owned();
    assert!(refused.contains("Permission denied"), "{refused}");
    kill(Pid::from_raw(node.child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(node.end(), Some(0), "{}", node.log());
    let database = node.path("data/dbs/app.db/database");
    assert_eq!(fs::metadata(&database).unwrap().uid(), NOBODY);
    assert_eq!(sqlite::run(&database, "select x from t"), "8");
}

/// As fuse.conf(5) says: users may let others in if root lets them.
#[test]
fn who_is_not_root_lets_others_in_only_if_root_allows_it() {
    let settings = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    let is_allowed = settings.lines().any(|line| line.trim() == "user_allow_other");
    let mut node = OfNobody::start(", allow-other: true", "ls mnt");
    assert_eq!(node.end(), Some(if is_allowed { 0 } else { 1 }), "{}", node.log());
    assert_eq!(node.log().contains("user_allow_other"), !is_allowed, "{}", node.log());
}
