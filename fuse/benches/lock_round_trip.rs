//! How long a lock call on a mounted file takes: F_SETLK there and back, from another process.
//!
//! `cargo bench -p fuse` prints median, mean and 99th percentile in microseconds for each transport
//! and each placement of client and workers on the CPUs, of all calls of several runs. The volume
//! answers at once, so what is measured is the transport. Beside it stands the same on a file
//! of the bare file system, where a lock call is one system call; and an fsync(2) of a page just
//! written, bare and through the mount.

#![allow(clippy::unwrap_used, reason = "a step that fails ends the benchmark")]

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuse::{
    Attr, Caller, Conflict, Created, DirEntry, Entry, Errno, FileType, Kernel, LockCall, Lookup,
    MountOptions, OpenMode, Opened, Owner, ROOT, Reply, SetAttr, StatFs, Transport, Volume, Wait,
    WaitId, Write,
};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Calls of one run.
const LOCKS: usize = 20_000;
const SYNCS: usize = 300;
/// Runs of one placement.
const RUNS: usize = 3;

/// What the client does over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Lock,
    Sync,
}

/// One file, on which every lock is granted.
struct Grants {
    file: File,
}

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
    fn open(&self, (): &(), _: i32, _: Caller) -> Result<Opened<()>, Errno> {
        Ok(Opened { handle: (), mode: OpenMode::Cached })
    }
    fn create(&self, _: &OsStr, _: i32, _: u32, _: Caller) -> Result<Created<(), ()>, Errno> {
        Err(Errno::EEXIST)
    }
    fn unlink(&self, _: &OsStr, reply: Reply<()>) {
        reply.send(Ok(()));
    }
    fn read(&self, (): &(), _: u64, _: &mut [u8]) -> Result<usize, Errno> {
        Ok(0)
    }
    fn write(&self, (): &(), write: Write<'_>, reply: Reply<u32>) {
        self.file.write_all_at(write.data, write.offset).unwrap();
        reply.send(Ok(write.data.len() as u32));
    }
    fn flush(&self, (): &(), _: Owner, reply: Reply<()>) {
        reply.send(Ok(()));
    }
    fn release(&self, (): ()) {}
    fn fsync(&self, (): &(), _: bool, reply: Reply<()>) {
        self.file.sync_all().unwrap();
        reply.send(Ok(()));
    }
    fn fsync_dir(&self, reply: Reply<()>) {
        reply.send(Ok(()));
    }
    fn getlk(&self, (): &(), _: LockCall) -> Result<Option<Conflict>, Errno> {
        Ok(None)
    }
    fn setlk(&self, (): &(), _: LockCall, _: Wait, reply: Reply<()>) {
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

/// The client's process: does its work, and prints the nanoseconds of each call.
fn client(path: &str, work: Work, place: Place) {
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
    let calls = if work == Work::Lock { LOCKS } else { SYNCS };
    let times = (0..calls).map(|call| {
        if work == Work::Sync {
            file.write_all_at(&[call as u8; 4096], 0).unwrap();
        }
        let start = Instant::now();
        match work {
            Work::Sync => file.sync_all().unwrap(),
            Work::Lock if call % 2 == 0 => lock(libc::F_WRLCK),
            Work::Lock => lock(libc::F_UNLCK),
        }
        start.elapsed().as_nanos()
    });
    let times: Vec<String> = times.map(|nanos| nanos.to_string()).collect();
    println!("{}", times.join(" "));
}

/// Median, mean and 99th percentile in microseconds.
fn measure(path: &Path, work: Work, place: Place) -> [f64; 3] {
    let mut times: Vec<f64> = (0..RUNS).flat_map(|_| run_client(path, work, place)).collect();
    times.sort_by(f64::total_cmp);
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    [times[times.len() / 2], mean, times[times.len() * 99 / 100]]
}

fn run_client(path: &Path, work: Work, place: Place) -> Vec<f64> {
    let place = place.map_or("any".to_owned(), |cpu| cpu.to_string());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["client", path.to_str().unwrap(), &format!("{work:?}"), &place])
        .output()
        .unwrap();
    let times = String::from_utf8(output.stdout).unwrap();
    times.split_whitespace().map(|nanos| nanos.parse::<f64>().unwrap() / 1000.0).collect()
}

/// Where the workers may run, and where the client.
#[derive(Debug, Clone, Copy)]
struct Placement {
    server: Place,
    client: Place,
}

fn run(transport: Transport, workers: usize, work: Work, placement: Placement) -> [f64; 3] {
    let temp = tempfile::tempdir().unwrap();
    // Threads inherit the place, and so do the workers.
    pin(placement.server);
    let mut options = MountOptions::new(temp.path(), tempfile::tempfile().unwrap());
    options.transport = transport;
    options.workers = workers;
    let backing = tempfile::NamedTempFile::new().unwrap();
    let volume = Grants { file: backing.reopen().unwrap() };
    let mount = fuse::mount(Arc::new(volume), options).unwrap();
    let times = measure(&temp.path().join("db-shm"), work, placement.client);
    mount.unmount().unwrap();
    pin(None);
    times
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, path, work, place] = arguments.as_slice()
        && role == "client"
    {
        let work = if work == "Sync" { Work::Sync } else { Work::Lock };
        client(path, work, place.parse().ok());
        return;
    }
    println!("us per call                median    mean     p99");
    bare();
    let (anywhere, together) =
        (Placement { server: None, client: None }, Placement { server: Some(0), client: Some(0) });
    let apart = Placement { server: Some(1), client: Some(0) };
    for workers in [1, 2] {
        let name = |placement: &str| format!("lock, dev x{workers}, {placement}");
        report(&name("anywhere"), run(Transport::Dev, workers, Work::Lock, anywhere));
        report(&name("one cpu"), run(Transport::Dev, workers, Work::Lock, together));
        report(&name("two cpus"), run(Transport::Dev, workers, Work::Lock, apart));
    }
    report("sync, dev x2", run(Transport::Dev, 2, Work::Sync, anywhere));
    if !fuse::uring_enabled() {
        println!("io_uring is not enabled: /sys/module/fuse/parameters/enable_uring");
        return;
    }
    // Its threads choose their own CPUs.
    report("lock, uring, anywhere", run(Transport::Uring, 0, Work::Lock, anywhere));
    for cpu in [0, 1] {
        let placement = Placement { server: None, client: Some(cpu) };
        let name = format!("lock, uring, on cpu {cpu}");
        report(&name, run(Transport::Uring, 0, Work::Lock, placement));
    }
    report("sync, uring", run(Transport::Uring, 0, Work::Sync, anywhere));
}

fn bare() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("bare");
    File::create(&path).unwrap();
    report("lock, bare file system", measure(&path, Work::Lock, None));
    report("sync, bare file system", measure(&path, Work::Sync, None));
}

fn report(name: &str, [median, mean, p99]: [f64; 3]) {
    println!("{name:24} {median:8.1} {mean:7.1} {p99:7.1}");
}
