//! How long a lock call on a mounted file takes: F_SETLK there and back, from another process.
//!
//! `cargo bench -p fuse` prints, for each number of workers and each placement of client and
//! server on the CPUs, the best, middle and worst of several runs in microseconds per call. The volume
//! answers at once, so what is measured is the transport. Beside it stands the same on a file
//! of the bare file system, where a lock call is one system call.

#![allow(clippy::unwrap_used, reason = "a step that fails ends the benchmark")]

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuse::{
    Attr, Conflict, Created, DirEntry, Entry, Errno, FileType, Kernel, LockKind, Lookup,
    MountOptions, OpenMode, Opened, Owner, ROOT, Range, Reply, SetAttr, StatFs, Transport, Volume,
    Wait, WaitId, Write,
};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Lock calls of one run.
const CALLS: u32 = 40_000;
/// Runs of one placement.
const RUNS: usize = 5;

/// One empty file, on which every lock is granted.
struct Grants;

fn attr(ino: u64, file_type: FileType) -> Attr {
    Attr {
        ino,
        size: 0,
        blocks: 0,
        mtime: SystemTime::UNIX_EPOCH,
        file_type,
        perm: 0o777,
        uid: 0,
        gid: 0,
        ttl: Duration::from_secs(60),
    }
}

impl Volume for Grants {
    type Node = ();
    type Handle = ();

    fn mounted(&self, _: Kernel) {}
    fn root(&self) -> Attr {
        attr(ROOT, FileType::Directory)
    }
    fn lookup(&self, _: &OsStr) -> Result<Lookup<()>, Errno> {
        let ttl = Duration::from_secs(60);
        Ok(Lookup::Found(Entry { node: (), attr: attr(2, FileType::Regular), ttl }))
    }
    fn getattr(&self, (): &()) -> Result<Attr, Errno> {
        Ok(attr(2, FileType::Regular))
    }
    fn setattr(&self, (): &(), _: Option<&()>, _: SetAttr, reply: Reply<Attr>) {
        reply.send(Ok(attr(2, FileType::Regular)));
    }
    fn open(&self, (): &(), _: i32) -> Result<Opened<()>, Errno> {
        Ok(Opened { handle: (), mode: OpenMode::Cached })
    }
    fn create(&self, _: &OsStr, _: i32, _: u32) -> Result<Created<(), ()>, Errno> {
        Err(Errno::EEXIST)
    }
    fn unlink(&self, _: &OsStr, reply: Reply<()>) {
        reply.send(Ok(()));
    }
    fn read(&self, (): &(), _: u64, _: &mut [u8]) -> Result<usize, Errno> {
        Ok(0)
    }
    fn write(&self, (): &(), write: Write<'_>, reply: Reply<u32>) {
        reply.send(Ok(write.data.len() as u32));
    }
    fn flush(&self, (): &(), _: Owner, reply: Reply<()>) {
        reply.send(Ok(()));
    }
    fn release(&self, (): ()) {}
    fn fsync(&self, (): &(), _: bool, reply: Reply<()>) {
        reply.send(Ok(()));
    }
    fn fsync_dir(&self, reply: Reply<()>) {
        reply.send(Ok(()));
    }
    fn getlk(&self, (): &(), _: Owner, _: Range, _: LockKind) -> Result<Option<Conflict>, Errno> {
        Ok(None)
    }
    fn setlk(&self, (): &(), _: Owner, _: Range, _: LockKind, _: Wait, reply: Reply<()>) {
        reply.send(Ok(()));
    }
    fn interrupt(&self, _: WaitId) -> bool {
        false
    }
    fn readdir(&self) -> Result<Vec<DirEntry>, Errno> {
        Ok(Vec::new())
    }
    fn statfs(&self) -> Result<StatFs, Errno> {
        Err(Errno::EIO)
    }
}

/// On which CPU something runs; anywhere without a number.
type Place = Option<usize>;

fn pin(place: Place) {
    let mut set = CpuSet::new();
    match place {
        Some(cpu) => set.set(cpu).unwrap(),
        None => (0..cpus()).for_each(|cpu| set.set(cpu).unwrap()),
    }
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

fn cpus() -> usize {
    let online = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
    online.unwrap().unwrap() as usize
}

/// The client's process: locks and unlocks, and prints nanoseconds per call.
fn client(path: &str, place: Place) {
    pin(place);
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let lock = |kind: i32| {
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 120,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_SETLK(&lock)).unwrap();
    };
    let start = Instant::now();
    for _ in 0..CALLS / 2 {
        lock(libc::F_WRLCK);
        lock(libc::F_UNLCK);
    }
    println!("{}", start.elapsed().as_nanos() / u128::from(CALLS));
}

/// Best, middle and worst of the runs, in microseconds.
fn measure(path: &Path, place: Place) -> [f64; 3] {
    let mut runs: Vec<f64> = (0..RUNS)
        .map(|_| {
            let place = place.map_or("any".to_owned(), |cpu| cpu.to_string());
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["client", path.to_str().unwrap(), &place])
                .output()
                .unwrap();
            let nanos = String::from_utf8(output.stdout).unwrap();
            nanos.trim().parse::<f64>().unwrap() / 1000.0
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    [runs[0], runs[RUNS / 2], runs[RUNS - 1]]
}

fn run(transport: Transport, workers: usize, server: Place, client: Place) -> [f64; 3] {
    let temp = tempfile::tempdir().unwrap();
    // Threads inherit the place, and so do the workers.
    pin(server);
    let mut options = MountOptions::new(temp.path(), tempfile::tempfile().unwrap());
    options.transport = transport;
    options.workers = workers;
    let mount = fuse::mount(Arc::new(Grants), options).unwrap();
    let times = measure(&temp.path().join("db-shm"), client);
    mount.unmount().unwrap();
    pin(None);
    times
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, path, place] = arguments.as_slice()
        && role == "client"
    {
        client(path, place.parse().ok());
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let bare = temp.path().join("bare");
    File::create(&bare).unwrap();
    println!("us per lock call      best  middle   worst");
    report("bare file system", measure(&bare, None));
    for workers in [1, 2, 4] {
        let name = |placement: &str| format!("dev x{workers} {placement}");
        report(&name("anywhere"), run(Transport::Dev, workers, None, None));
        report(&name("one cpu"), run(Transport::Dev, workers, Some(0), Some(0)));
        report(&name("two cpus"), run(Transport::Dev, workers, Some(1), Some(0)));
    }
}

fn report(name: &str, [best, middle, worst]: [f64; 3]) {
    println!("{name:18} {best:7.1} {middle:7.1} {worst:7.1}");
}
