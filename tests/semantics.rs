//! What `docs/SEMANTICS.md` promises to applications, quoted above a test each; promises that another
//! module shows name its test there. Also, that the documents name only tests that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rusqlite::Connection;
use test_case::test_case;

use crate::support::node::{Node, Settings};
use crate::support::sqlite;

fn node(passthrough: &'static str) -> Node {
    Node::primary(&Settings { passthrough, ..Settings::default() })
}

/// P4: "A transaction over attached databases is one transaction in each of them."
#[test_case("delete")]
#[test_case("persist")]
fn a_transaction_over_two_databases_is_captured_in_both(mode: &str) {
    let node = node("auto");
    for name in ["one.db", "two.db"] {
        let sql = format!("pragma journal_mode = {mode}; create table t(x)");
        sqlite::run(&node.file(name), &sql);
    }
    let before = ["one.db", "two.db"].map(|name| node.pos(name).txid.next());
    let one = sqlite::open(&node.file("one.db"));
    let attach = format!("attach '{}' as two", node.file("two.db").display());
    one.execute_batch(&attach).unwrap();
    one.execute_batch("begin; insert into t values (1); insert into two.t values (2); commit")
        .unwrap();
    assert_eq!(["one.db", "two.db"].map(|name| node.pos(name).txid), before);
    assert_eq!(sqlite::run(&node.file("two.db"), "select sum(x) from t"), "2");
}

/// P5: "journal_mode MEMORY and OFF are refused: the first write fails with "disk I/O error"
/// (SQLITE_IOERR), nothing is changed, and the log names the pragma."
#[test_case("memory", "auto")]
#[test_case("memory", "off")]
#[test_case("off", "auto")]
fn a_write_without_a_journal_is_refused(mode: &str, passthrough: &'static str) {
    let node = node(passthrough);
    let file = node.file("app.db");
    sqlite::run(&file, "create table t(x); insert into t values (1)");
    let pos = node.pos("app.db");
    let db: Connection = sqlite::open(&file);
    let found: String = sqlite::value(&db, &format!("pragma journal_mode = {mode}"));
    assert_eq!(found, mode);
    let error = db.execute_batch("insert into t values (2)").unwrap_err();
    assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::SystemIoFailure), "{error}");
    drop(db);
    assert_eq!(node.pos("app.db"), pos);
    assert_eq!(sqlite::run(&file, "pragma integrity_check; select sum(x) from t"), "ok\n1");
    assert_eq!(node.log_count("use journal_mode DELETE, TRUNCATE, PERSIST or WAL"), 1);
}

/// `docs/differences.md`, 22: "Any size is taken; only nothing commits".
#[test]
fn a_journal_size_limit_is_kept() {
    let node = node("auto");
    let file = node.file("app.db");
    sqlite::run(&file, "create table t(x)");
    let db = sqlite::open(&file);
    let _: String = sqlite::value(&db, "pragma journal_mode = persist");
    let _: i64 = sqlite::value(&db, "pragma journal_size_limit = 3000");
    db.execute_batch("insert into t values (zeroblob(100000))").unwrap();
    let before = node.pos("app.db").txid;
    db.execute_batch("update t set x = zeroblob(90000)").unwrap();
    assert_eq!(node.pos("app.db").txid, before.next());
    assert_eq!(fs::metadata(node.file("app.db-journal")).unwrap().len(), 3000);
}

/// The words in backticks of `text` that have the shape of a test's name.
fn named_tests(text: &str) -> BTreeSet<&str> {
    let words = text.split('`').skip(1).step_by(2);
    let is_name = |word: &&str| {
        word.matches('_').count() >= 3
            && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
    };
    words.filter(is_name).collect()
}

/// Adds the names of all functions below `dir`.
fn functions(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(path).unwrap();
            let names = text.lines().filter_map(|line| line.trim_start().split_once("fn "));
            let names = names.filter_map(|(_, rest)| rest.split_once('('));
            found.extend(names.map(|(name, _)| name.to_owned()));
        }
    }
}

#[test]
fn the_documents_name_only_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for dir in ["src", "tests", "fuse/src", "fuse/tests", "ltx/src", "ltx/tests"] {
        functions(&root.join(dir), &mut known);
    }
    for document in ["docs/SEMANTICS.md", "docs/differences.md"] {
        let text = fs::read_to_string(root.join(document)).unwrap();
        let named = named_tests(&text);
        assert!(named.len() > 20, "{document} names {} tests", named.len());
        let missing: Vec<_> = named.iter().filter(|name| !known.contains(**name)).collect();
        assert!(missing.is_empty(), "{document} names tests that do not exist: {missing:?}");
    }
}

/// Others quote a promise by its number.
#[test]
fn each_promise_has_a_number_of_its_own() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/SEMANTICS.md")).unwrap();
    let numbers = text.lines().filter_map(|line| line.strip_prefix("* **")?.split_once("**"));
    let (mut known, mut twice) = (BTreeSet::new(), Vec::new());
    for (number, _) in numbers {
        if !known.insert(number) {
            twice.push(number);
        }
    }
    assert!(known.len() > 50, "only {} promises found", known.len());
    assert!(twice.is_empty(), "these stand for two promises each: {twice:?}");
}
