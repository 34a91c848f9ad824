//! What shells and scripts do to the files of a mount: `rm`, `cp`, `touch`, `mv`. It is done, or it
//! is refused and nothing is harmed.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use litefs::engine::files::FileKind;
use litefs::engine::layout::DbDir;
use ltx::Checksum;
use test_case::{test_case, test_matrix};

use super::{DB, Watched, check_integrity, check_silent, sqlite, strict};
use crate::support::local::Local;
use crate::support::shell::Shell;

const FILL: &str = "create table t(id integer primary key, a, b); \
    with recursive n(i) as (select 1 union all select i + 1 from n where i < 300) \
    insert into t(a, b) select i, hex(randomblob(100)) from n";

/// The error of a call on a file that must fail.
#[track_caller]
fn errno(result: std::io::Result<()>) -> Option<i32> {
    result.expect_err("not refused").raw_os_error()
}

#[test_matrix(["delete", "wal"], [4096, 512, 65536], ["auto", "off"])]
fn a_removed_database_can_be_made_again(mode: &str, page_size: u32, passthrough: &'static str) {
    let mut node = strict(passthrough);
    let file = node.file(DB);
    let fill = format!("pragma journal_mode={mode}; {FILL};");
    sqlite::run(&file, &fill);
    let mut watched = Watched::new(&node, DB);
    fs::remove_file(&file).unwrap();
    assert!(!file.exists());
    watched.txid += 1;
    assert_eq!(node.pos(DB).txid.0, watched.txid, "the removal is a transaction");
    assert_eq!(node.pos(DB).checksum, Checksum::EMPTY);
    assert!(node.databases().is_empty());
    sqlite::run(&file, &format!("pragma page_size={page_size}; {fill}"));
    watched.expect("made again", if mode == "wal" { 3 } else { 2 });
    let db = sqlite::open(&file);
    assert_eq!(sqlite::value::<u32>(&db, "pragma page_size"), page_size);
    watched.run(&db, "update t set a = a + 1", 1);
    check_integrity(&db);
    drop(db);
    watched.check_chain();
    check_silent(&node);
    let pos = node.pos(DB);
    node.stop();
    node.start();
    assert_eq!(node.pos(DB), pos);
}

#[test]
fn a_removed_database_stays_removed_after_a_restart() {
    let mut node = strict("auto");
    let file = node.file(DB);
    sqlite::run(&file, &format!("{FILL};"));
    fs::remove_file(&file).unwrap();
    let pos = node.pos(DB);
    for _ in 0..2 {
        node.stop();
        node.start();
        assert_eq!(node.pos(DB), pos);
        assert!(!file.exists());
    }
    node.kill();
    node.start();
    assert_eq!(node.pos(DB), pos);
    let mut watched = Watched::new(&node, DB);
    watched.run(&sqlite::open(&file), FILL, 2);
    watched.check_chain();
}

/// The kernel hears of what went with a database after the call that removed it. SQLite removes a WAL that it
/// finds beside a new database, and takes it for a disk I/O error if none is left any more.
#[test]
fn nobody_finds_a_wal_that_is_gone() {
    let node = Local::primary("auto", 1, None);
    let setup = ".filectrl persist_wal 1\npragma journal_mode=wal; create table t(x);";
    sqlite::run(&node.file(DB), setup);
    let name = node.file(&format!("{DB}-wal"));
    let exists = || Command::new("test").arg("-e").arg(&name).status().unwrap().success();
    assert!(exists());
    assert!(node.db(DB).files().remove(FileKind::Wal).unwrap());
    assert!(!exists(), "and nobody told the kernel");
}

/// Half a transaction must not become a commit.
#[test_matrix(["delete", "truncate", "persist"], ["auto", "off"])]
fn a_journal_that_is_needed_cannot_be_removed(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let file = node.file(DB);
    let journal = node.file("app.db-journal");
    let mut watched = Watched::new(&node, DB);
    sqlite::run(&file, &format!("pragma journal_mode={mode}; {FILL};"));
    watched.expect("fill", 2);
    let before = sqlite::run(&file, ".dump");
    let mut shell = Shell::open(&file);
    shell.run(&format!("pragma journal_mode={mode}; pragma cache_size=2"));
    shell.run("begin; update t set b = hex(randomblob(150)); update t set a = 0");
    // Its locks go, the journal of a half-written transaction stays.
    shell.kill();
    assert_eq!(errno(fs::remove_file(&journal)), Some(libc::EBUSY));
    let cut = OpenOptions::new().write(true).open(&journal).and_then(|file| file.set_len(0));
    assert_eq!(errno(cut), Some(libc::EBUSY));
    assert_eq!(node.pos(DB).txid.0, watched.txid);
    assert_eq!(sqlite::run(&file, ".dump"), before, "the next reader rolls back");
    watched.expect("rolled back", 0);
    watched.run(&sqlite::open(&file), "update t set a = a + 1", 1);
    watched.check_chain();
}

/// Who has a transaction open in rollback mode, or the database in WAL mode, has it locked.
#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn files_in_use_cannot_be_removed(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let file = node.file(DB);
    let mut watched = Watched::new(&node, DB);
    let mut shell = Shell::open(&file);
    shell.run(&format!("pragma journal_mode={mode}; {FILL}"));
    watched.expect("fill", if mode == "wal" { 3 } else { 2 });
    shell.run("begin; select count(*) from t");
    assert_eq!(errno(fs::remove_file(&file)), Some(libc::EBUSY));
    if mode == "wal" {
        assert_eq!(errno(fs::remove_file(node.file("app.db-wal"))), Some(libc::EBUSY));
        assert_eq!(errno(fs::remove_file(node.file("app.db-shm"))), Some(libc::EBUSY));
    }
    shell.run("insert into t(a) values (1); commit");
    watched.expect("the transaction goes on", 1);
    assert_eq!(shell.run("pragma integrity_check"), "ok");
    watched.check_chain();
    shell.close();
    fs::remove_file(&file).unwrap();
    watched.expect("removed when nobody has it", 1);
}

#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn a_copy_over_a_database_is_refused(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let file = node.file(DB);
    let mut watched = Watched::new(&node, DB);
    let db = sqlite::open(&file);
    db.execute_batch(&format!("pragma journal_mode={mode}; {FILL}")).unwrap();
    watched.expect("fill", if mode == "wal" { 3 } else { 2 });
    let other = node.scratch("other.db");
    sqlite::run(&other, "create table u(x); insert into u values (zeroblob(100000));");
    for target in [&file, &node.file("new.db")] {
        assert!(fs::copy(&other, target).is_err(), "cp to {}", target.display());
    }
    // Not even with locks out of the way.
    assert!(write_raw(&file).is_err());
    watched.expect("refused copies", 0);
    check_integrity(&db);
    watched.run(&db, "update t set a = a + 1", 1);
    watched.check_chain();
    assert_eq!(node.databases(), [DB], "what could not be copied is not there");
    watched.run(&sqlite::open(&file), "update t set a = a + 1", 1);
    let new = &sqlite::open(&node.file("new.db"));
    Watched::new(&node, "new.db").run(new, FILL, 2);
}

/// What some frameworks put beside their database, to keep it from being served.
#[test]
fn a_file_that_is_no_database_is_refused_and_not_shown() {
    let node = strict("auto");
    assert!(fs::write(node.file(".htaccess"), "DENY FROM ALL").is_err());
    assert_eq!(node.log_count("refused a write: not a SQLite database"), 1);
    Watched::new(&node, ".ht.sqlite").run(&sqlite::open(&node.file(".ht.sqlite")), FILL, 2);
    let names = fs::read_dir(node.mount()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names, [".ht.sqlite", ".ht.sqlite-pos", ".lag"]);
    let status = String::from_utf8(node.litefs("status", &[]).stdout).unwrap();
    assert!(status.contains(".ht.sqlite") && !status.contains(".htaccess"), "{status}");
}

/// Bytes over the beginning of a file, without locks or a journal.
fn write_raw(path: &Path) -> std::io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(&[1; 4096])
}

/// An answer that means "not implemented" would make the kernel stop asking, for good.
#[test]
fn names_that_cannot_be_made_do_not_stop_others() {
    let node = strict("auto");
    for name in ["x-pos", "x-lock", ".primary", ".lag", "a/b", "-pos", "-journal"] {
        assert!(File::create(node.file(name)).is_err(), "{name}");
    }
    for name in ["x-journal", "x-wal", "x-shm"] {
        assert!(File::create(node.file(name)).is_err(), "{name} of a database that is not there");
    }
    let mut watched = Watched::new(&node, DB);
    watched.run(&sqlite::open(&node.file(DB)), FILL, 2);
    assert!(File::create(node.file("app.db-pos")).is_err());
    assert!(fs::remove_file(node.file("app.db-pos")).is_err());
    let mount = node.mount();
    assert!(fs::create_dir(mount.join("dir")).is_err());
    assert!(fs::rename(mount.join(DB), mount.join("other.db")).is_err());
    assert!(fs::hard_link(mount.join(DB), mount.join("other.db")).is_err());
    assert!(std::os::unix::fs::symlink(DB, mount.join("other.db")).is_err());
    watched.run(&sqlite::open(&node.file("app.db")), "update t set a = a + 1", 1);
    Watched::new(&node, "new.db").run(&sqlite::open(&node.file("new.db")), FILL, 2);
    assert_eq!(node.databases(), [DB, "new.db"]);
    check_silent(&node);
}

#[test]
fn the_position_file_shows_every_commit_through_one_descriptor() {
    use std::os::unix::fs::FileExt;
    let node = strict("auto");
    let db = sqlite::open(&node.file(DB));
    db.execute_batch(FILL).unwrap();
    let file = File::open(node.file("app.db-pos")).unwrap();
    for txid in 3..9 {
        db.execute_batch("update t set a = a + 1").unwrap();
        let mut text = [0; 34];
        file.read_exact_at(&mut text, 0).unwrap();
        let text = String::from_utf8(text.to_vec()).unwrap();
        assert_eq!(text, format!("{}\n", node.pos(DB)));
        assert!(text.starts_with(&format!("{txid:016x}/")), "{text}");
    }
}

/// A node that finds what it does not know in its data directory leaves it alone.
#[test_case("dbs/stray-file")]
#[test_case("dbs/app.db/stray-file")]
#[test_case("dbs/app.db/ltx/stray-file")]
#[test_case("dbs/app.db/ltx/0000000000000003-0000000000000003.ltx.tmp")]
fn stray_files_do_no_harm(path: &str) {
    let mut node = strict("auto");
    sqlite::run(&node.file(DB), &format!("{FILL};"));
    let pos = node.pos(DB);
    node.stop();
    fs::write(node.data().join(path), "stray").unwrap();
    node.start();
    assert_eq!(node.pos(DB), pos);
    let mut watched = Watched::new(&node, DB);
    watched.run(&sqlite::open(&node.file(DB)), "update t set a = a + 1", 1);
    watched.check_chain();
}

/// One that is beyond repair is left as it is, and the others work.
#[test]
fn a_broken_database_does_not_stop_the_others() {
    let mut node = strict("auto");
    for name in [DB, "broken.db"] {
        sqlite::run(&node.file(name), &format!("{FILL};"));
    }
    node.stop();
    break_beyond_repair(&node.db_dir("broken.db"));
    node.start();
    let mut watched = Watched::new(&node, DB);
    watched.run(&sqlite::open(&node.file(DB)), "update t set a = a + 1", 1);
    assert!(node.log_count("broken.db") > 0, "{}", node.log());
    sqlite::refused(&node.file("broken.db"), "insert into t(a) values (1);");
    assert_eq!(fs::read(node.db_dir("broken.db").database()).unwrap(), b"not a database");
}

/// No chain, and a file that is no database.
fn break_beyond_repair(dir: &DbDir) {
    fs::remove_dir_all(dir.ltx()).unwrap();
    let _ = fs::remove_file(dir.checksums());
    fs::write(dir.database(), "not a database").unwrap();
}
