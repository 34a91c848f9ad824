//! File calls that SQLite seldom or never makes: mappings, sendfile, unbuffered reads.
//! What reads sees what is committed; what would change a database past SQLite changes nothing.

use test_case::test_matrix;

use super::{DB, Node, check_chain, sqlite, strict_over};
use crate::cluster::Cluster;
use crate::support::node::Settings;
use crate::support::process::Process;
use crate::support::shell::Shell;
use crate::support::wait;

/// A database in rollback mode, whose file is all of it.
fn database(node: &Node) -> super::Connection {
    let db = sqlite::open(&node.file(DB));
    db.execute_batch("create table t(a, b); insert into t values (1, zeroblob(20000))").unwrap();
    db
}

/// sendfile, preadv, pread on a descriptor without a cache, and a mapping show the
/// newest commit each time.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn every_way_to_read_shows_the_newest_commit(passthrough: &'static str, transport: &'static str) {
    let node = strict_over(transport, passthrough);
    let db = database(&node);
    let mut reader = Process::open(&node.file(DB));
    let copy = node.scratch("copy");
    reader.expect(&format!("(c := os.open({copy:?}, os.O_RDWR | os.O_CREAT)) and None"), "None");
    let direct = format!("(d := os.open({:?}, os.O_RDWR | os.O_DIRECT)) and None", node.file(DB));
    reader.expect(&direct, "None");
    reader.expect("(m := mapped(f, 4096)) and None", "None");
    // A page of memory, where a read past the cache may put what it reads.
    reader.expect("(page := mmap.mmap(-1, 4096)) and None", "None");
    for round in 2..5 {
        db.execute_batch(&format!("insert into t values ({round}, zeroblob(3000))")).unwrap();
        // Bytes 24 to 27 of the file count its changes.
        let file = std::fs::read(node.file(DB)).unwrap();
        let counter = format!("{:?}", u32::from_be_bytes(file[24..28].try_into().unwrap()));
        let len = file.len();
        let value = |bytes: &str| format!("int.from_bytes({bytes}, 'big')");
        reader.expect(&value("os.pread(f, 4, 24)"), &counter);
        reader.expect(&value("m[24:28]"), &counter);
        let preadv = "os.preadv(f, [a := bytearray(24), b := bytearray(4)], 0)";
        reader.expect(&format!("({preadv}, {})[1]", value("b")), &counter);
        reader.expect(&format!("(os.preadv(d, [page], 0), {})", value("page[24:28]")), &{
            format!("(4096, {counter})")
        });
        let read_copy = value("os.pread(c, 4, 24)");
        reader.expect(&format!("(os.sendfile(c, f, 0, {len}), {read_copy})[1]"), &counter);
        assert_eq!(std::fs::read(&copy).unwrap(), file);
        reader.expect("os.ftruncate(c, 0) or os.lseek(c, 0, 0)", "0");
        // Programs that copy files then read and write.
        reader.expect(&format!("os.copy_file_range(f, c, {len}, 0, 0)"), "EXDEV");
    }
    assert_eq!(sqlite::run(&copy_of(&node), "pragma integrity_check"), "ok");
}

/// A copy of the database file, made by reading it.
fn copy_of(node: &Node) -> std::path::PathBuf {
    let copy = node.scratch("read");
    std::fs::copy(node.file(DB), &copy).unwrap();
    copy
}

/// Bytes that come past SQLite, in whatever way, are refused, and the database is what it was.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn nothing_is_written_past_sqlite(passthrough: &'static str, transport: &'static str) {
    let node = strict_over(transport, passthrough);
    let db = database(&node);
    let before = (node.pos(DB), std::fs::read(node.file(DB)).unwrap());
    let path = node.file(DB);
    let mut writer = Process::open(&path);
    writer.expect("os.pwrite(f, bytes(4096), 4096)", "EIO");
    writer.expect("os.pwritev(f, [bytes(100), bytes(100)], 0)", "EIO");
    writer.expect("os.ftruncate(f, 4096)", "EIO");
    writer.expect(&format!("os.open({path:?}, os.O_RDWR | os.O_TRUNC)"), "EIO");
    writer.expect(&format!("(z := os.open({:?}, os.O_RDONLY)) and None", "/dev/zero"), "None");
    writer.expect("(s := os.memfd_create('s')) and os.ftruncate(s, 4096)", "None");
    writer.expect("os.lseek(f, 0, 0) or os.sendfile(f, s, 0, 4096)", "EIO");
    writer.expect("os.copy_file_range(s, f, 4096, 0, 0)", "EXDEV");
    let direct = format!("(d := os.open({path:?}, os.O_RDWR | os.O_DIRECT)) and None");
    writer.expect(&direct, "None");
    writer.expect("(page := mmap.mmap(-1, 4096)) and None", "None");
    writer.expect("os.pwritev(d, [page], 0)", "EIO");
    let rename = format!("os.rename({path:?}, {:?})", node.file("other.db"));
    writer.expect(&rename, "EPERM");
    let link = format!("os.link({path:?}, {:?})", node.file("other.db"));
    writer.expect(&link, "EPERM");
    writer.expect("(m := mapped(f, 8192, mmap.ACCESS_WRITE)) and None", "None");
    writer.expect("m.__setitem__(4100, m[4100] ^ 255)", "None");
    writer.expect("m.flush()", "EIO");
    drop(writer);
    wait::until_true("what was there", || std::fs::read(&path).unwrap() == before.1);
    assert_eq!((node.pos(DB), std::fs::read(&path).unwrap()), before);
    // The next sync of who had the file open fails too: the kernel tells them all, once.
    db.execute_batch("insert into t values (5, 5)").unwrap_err();
    assert_eq!(node.pos(DB), before.0);
    db.execute_batch("insert into t values (5, 5)").unwrap();
    assert_eq!(sqlite::value::<String>(&db, "pragma integrity_check"), "ok");
    check_chain(&node.db_dir(DB), node.pos(DB));
}

/// SQLite's backup of an empty database with small pages leaves a file that ends within a page.
#[test_matrix(["auto", "off"])]
fn a_database_that_would_end_within_a_page_is_refused(passthrough: &'static str) {
    let node = strict_over("auto", passthrough);
    let db = database(&node);
    let before = (node.pos(DB), std::fs::read(node.file(DB)).unwrap());
    let mut other = Process::open(&node.file(DB));
    other.expect("(e := sqlite3.connect(':memory:')) and None", "None");
    other.expect("e.execute('pragma page_size=1024') and None", "None");
    let backup = format!("e.backup(sqlite3.connect({:?}))", node.file(DB));
    other.expect(&backup, "disk I/O error");
    drop(other);
    assert_eq!(node.log_count("the database would end within page 1"), 1, "{}", node.log());
    // Who comes next plays the journal back.
    assert_eq!(sqlite::value::<String>(&db, "pragma integrity_check"), "ok");
    assert!((node.pos(DB), std::fs::read(node.file(DB)).unwrap()) == before);
    db.execute_batch("insert into t values (5, 5)").unwrap();
    check_chain(&node.db_dir(DB), node.pos(DB));
}

/// Two processes that map one wal-index see what the other writes there.
#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn a_wal_index_is_one_memory_for_all(passthrough: &'static str, transport: &'static str) {
    let node = strict_over(transport, passthrough);
    let db = sqlite::open(&node.file(DB));
    db.execute_batch("pragma journal_mode=wal; create table t(a)").unwrap();
    let shm = node.file("app.db-shm");
    let mut two = [0, 1].map(|_| Process::open(&shm));
    for process in &mut two {
        process.expect("(m := mapped(f, 32768, mmap.ACCESS_WRITE)) and None", "None");
    }
    let [a, b] = &mut two;
    // Bytes 132 to 135 are nobody's.
    a.expect("m.__setitem__(132, 7)", "None");
    b.expect("m[132]", "7");
    b.expect("os.pread(f, 1, 132)[0]", "7");
    b.expect("m.__setitem__(132, 8)", "None");
    a.expect("m[132]", "8");
    // And what SQLite writes: its count of changes.
    let count = "int.from_bytes(m[8:12], 'little')";
    let before: u32 = a.tell(count).parse().unwrap();
    sqlite::run(&node.file(DB), "insert into t values (1)");
    a.expect(count, &(before + 1).to_string());
    b.expect(count, &(before + 1).to_string());
}

/// Readers that map the database see each commit, also where the file becomes shorter under them; in an
/// open transaction they keep what they have seen.
#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn a_replica_may_be_mapped_into_memory(mode: &str, passthrough: &'static str) {
    let settings = Settings { passthrough, ..Settings::default() };
    let cluster = Cluster::with(2, &settings);
    let mut writer = Shell::open(&cluster.file(DB));
    writer.run(&format!("pragma journal_mode={mode}; create table t(id integer primary key, b)"));
    let many = "with recursive n(i) as (select 1 union all select i + 1 from n where i < 300) \
                insert into t(b) select zeroblob(2000) from n";
    cluster.sync(DB);
    let mut readers = [0, 1].map(|_| Shell::open(&cluster.replica().file(DB)));
    for reader in &mut readers {
        reader.run("pragma mmap_size=100000000");
    }
    for round in 1..=4 {
        writer.run(many);
        cluster.sync(DB);
        for reader in &mut readers {
            let rows = reader.run("select count(*), sum(length(b)) from t");
            assert_eq!(rows, format!("{}|{}", 300, 300 * 2000), "round {round}");
        }
        let [keeps, other] = &mut readers;
        let whole = "select count(*), sum(length(b)), sum(b = zeroblob(2000)) from t";
        let rows = keeps.run(&format!("begin; {whole}"));
        assert_eq!(rows, format!("300|{}|300", 300 * 2000), "round {round}");
        writer.run(&format!("update t set b = {round}"));
        writer.run("delete from t where id > 10; vacuum");
        if mode == "wal" {
            writer.run("pragma wal_checkpoint(truncate)");
            // Nobody waits for it, and the other reader sees the newest state.
            cluster.sync(DB);
            assert_eq!(other.run("select count(*), sum(b) from t"), format!("10|{}", 10 * round));
        }
        assert_eq!(keeps.run(whole), rows, "round {round}");
        keeps.run("commit");
        cluster.sync(DB);
        for reader in &mut readers {
            assert_eq!(reader.run("select count(*), sum(b) from t"), format!("10|{}", 10 * round));
            assert_eq!(reader.run("pragma integrity_check"), "ok");
        }
        writer.run("delete from t");
        cluster.sync(DB);
    }
    readers.into_iter().for_each(Shell::close);
    cluster.check();
}
