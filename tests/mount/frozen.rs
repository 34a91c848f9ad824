//! A data directory on a disk that does not answer for a while.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{DB, Node, check_chain, sqlite};
use crate::support::node::{Member, Settings};
use crate::support::shell::Shell;

fn call(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

/// A file system of its own for the data directory; thawed and unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(node: &Node) -> Disk {
        let (image, data) = (node.scratch("disk.img"), node.data());
        fs::create_dir_all(&data).unwrap();
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let (image, text) = (image.to_str().unwrap(), data.to_str().unwrap());
        call("mkfs.ext4", &["-q", image]);
        call("mount", &["-o", "loop", image, text]);
        Disk(data)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let quietly = |program: &str, argument: &str, path: &Path| {
            let _ = Command::new(program).arg(argument).arg(path).status();
        };
        quietly("fsfreeze", "-u", &self.0);
        quietly("umount", "-l", &self.0);
    }
}

#[test]
fn a_request_that_hangs_is_named_in_the_log() {
    let mut node = Node::new(&Settings::default(), Member::Primary);
    node.may_hang();
    let disk = Disk::mount(&node);
    node.start();
    let mut shell = Shell::open(&node.file(DB));
    shell.run("pragma journal_mode=delete; create table t(x); insert into t values (1)");
    call("fsfreeze", &["-f", disk.path()]);
    shell.begin("insert into t values (2)");
    node.wait_for_log("fuse request is not answered yet");
    let log = node.log();
    let line = log.lines().find(|line| line.contains("is not answered yet")).unwrap();
    let pid = format!("pid={}", shell.pid());
    for part in ["request=", "file=", &pid, "seconds=5"] {
        assert!(line.contains(part), "{part} in {line}");
    }
    call("fsfreeze", &["-u", disk.path()]);
    shell.end();
    assert_eq!(shell.run("select sum(x) from t"), "3");
    shell.close();
    check_chain(&node.db_dir(DB), node.pos(DB));
    sqlite::run(&node.file(DB), "insert into t values (3)");
    node.stop();
    drop(disk);
}
