//! How long a lock call on a mounted file takes: F_SETLK there and back, from another process.
//!
//! `cargo bench -p fuse` prints a line for each transport and each placement of client and workers
//! on the CPUs, over all calls of several runs: median, mean, 99th percentile in microseconds; how
//! many of a hundred calls came back on another CPU; and the CPU time of both sides together for one
//! call. Words behind `--` choose lines that contain them all. The volume answers at once, so what
//! is measured is the transport. Beside it stands the same on a file of the bare file system, where
//! a lock call is one system call; calls with a pause before each, after which everybody sleeps; an
//! fsync(2) of a page just written; and the CPU time of a second in which nothing is asked.

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
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::unistd::Pid;

/// Calls of one run.
const LOCKS: usize = 20_000;
const PACED: usize = 500;
const SYNCS: usize = 300;
/// The pause before a paced call.
const PAUSE: Duration = Duration::from_millis(2);
/// How long nothing is asked.
const IDLE: Duration = Duration::from_secs(1);
/// Runs of one placement.
const RUNS: usize = 3;

/// What the client does over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Lock,
    Paced,
    Sync,
    Idle,
}

impl Work {
    const ALL: [Work; 4] = [Work::Lock, Work::Paced, Work::Sync, Work::Idle];

    fn calls(self) -> usize {
        match self {
            Work::Lock => LOCKS,
            Work::Paced => PACED,
            Work::Sync => SYNCS,
            Work::Idle => 0,
        }
    }
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
    fn name_of(&self, _: &()) -> String {
        String::new()
    }
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
    fn setattr(&self, (): &(), _: SetAttr, reply: Reply<Attr>) {
        reply.send(Ok(attr(2, FileType::Regular)));
    }
    fn open(&self, (): &(), _: Caller) -> Result<Opened<()>, Errno> {
        Ok(Opened { handle: (), mode: OpenMode::Cached })
    }
    fn create(&self, _: &OsStr, _: i32, _: Caller) -> Result<Created<(), ()>, Errno> {
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

/// The client's process: does its work, and prints the nanoseconds of each call, negative if it
/// ended on another CPU than it began on.
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
    if work == Work::Idle {
        lock(libc::F_WRLCK);
        std::thread::sleep(IDLE);
    }
    let times = (0..work.calls()).map(|call| {
        match work {
            Work::Sync => file.write_all_at(&[call as u8; 4096], 0).unwrap(),
            Work::Paced => std::thread::sleep(PAUSE),
            Work::Lock | Work::Idle => {}
        }
        let before = sched_getcpu().unwrap();
        let start = Instant::now();
        match work {
            Work::Sync => file.sync_all().unwrap(),
            _ if call % 2 == 0 => lock(libc::F_WRLCK),
            _ => lock(libc::F_UNLCK),
        }
        let nanos = start.elapsed().as_nanos() as i64;
        if sched_getcpu().unwrap() == before { nanos } else { -nanos }
    });
    let times: Vec<String> = times.map(|nanos| nanos.to_string()).collect();
    println!("{}", times.join(" "));
}

/// What the runs of one line have in common: the nanoseconds of each call, as the client says them,
/// and the CPU time of this process and of its clients.
#[derive(Default)]
struct Measured {
    times: Vec<i64>,
    server: Duration,
    clients: Duration,
}

fn measure(path: &Path, work: Work, place: Place) -> Measured {
    let mut measured = Measured::default();
    for _ in 0..RUNS {
        let before = (cpu_time(UsageWho::RUSAGE_SELF), cpu_time(UsageWho::RUSAGE_CHILDREN));
        measured.times.extend(run_client(path, work, place));
        measured.server += cpu_time(UsageWho::RUSAGE_SELF) - before.0;
        measured.clients += cpu_time(UsageWho::RUSAGE_CHILDREN) - before.1;
    }
    measured
}

fn cpu_time(who: UsageWho) -> Duration {
    let usage = getrusage(who).unwrap();
    let total = usage.user_time() + usage.system_time();
    Duration::from_micros(total.num_microseconds() as u64)
}

fn run_client(path: &Path, work: Work, place: Place) -> Vec<i64> {
    let place = place.map_or("any".to_owned(), |cpu| cpu.to_string());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["client", path.to_str().unwrap(), &format!("{work:?}"), &place])
        .output()
        .unwrap();
    let times = String::from_utf8(output.stdout).unwrap();
    times.split_whitespace().map(|nanos| nanos.parse().unwrap()).collect()
}

/// Where the workers may run, and where the client.
#[derive(Debug, Clone, Copy)]
struct Placement {
    server: Place,
    client: Place,
}

/// What is measured in a mount.
#[derive(Clone, Copy)]
struct Case {
    transport: Transport,
    workers: usize,
    work: Work,
    placement: Placement,
}

fn run(case: Case) -> Measured {
    let temp = tempfile::tempdir().unwrap();
    // Threads inherit the place, and so do the workers.
    pin(case.placement.server);
    let mut options = MountOptions::new(temp.path(), tempfile::tempfile().unwrap());
    options.transport = case.transport;
    options.workers = case.workers;
    let backing = tempfile::NamedTempFile::new().unwrap();
    let volume = Grants { file: backing.reopen().unwrap() };
    let mount = fuse::mount(Arc::new(volume), options).unwrap();
    let measured = measure(&temp.path().join("db-shm"), case.work, case.placement.client);
    mount.unmount().unwrap();
    pin(None);
    measured
}

const ANYWHERE: Placement = Placement { server: None, client: None };

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, path, work, place] = arguments.as_slice()
        && role == "client"
    {
        let work = Work::ALL.into_iter().find(|known| format!("{known:?}") == *work).unwrap();
        client(path, work, place.parse().ok());
        return;
    }
    let words: Vec<&str> =
        arguments[1..].iter().map(String::as_str).filter(|word| !word.starts_with('-')).collect();
    println!("us per call                median    mean     p99   moved     CPU");
    let report = |name: &str, work: Work, run: &dyn Fn() -> Measured| {
        if words.iter().all(|word| name.contains(word)) {
            report(name, work, &run());
        }
    };
    for work in [Work::Lock, Work::Sync] {
        report(&format!("{} bare", name(work)), work, &|| bare(work));
    }
    for (transport, workers, placement, placed) in columns() {
        let which = match transport {
            Transport::Uring => "uring".to_owned(),
            _ => format!("dev x{workers}"),
        };
        let is_anywhere = placed == "anywhere";
        for work in Work::ALL.into_iter().filter(|work| *work == Work::Lock || is_anywhere) {
            let case = Case { transport, workers, work, placement };
            report(&format!("{} {which} {placed}", name(work)), work, &|| run(case));
        }
    }
}

fn name(work: Work) -> &'static str {
    match work {
        Work::Lock => "lock",
        Work::Paced => "paced",
        Work::Sync => "sync",
        Work::Idle => "idle",
    }
}

/// Every transport with its placements. The threads of io_uring choose their own CPUs.
fn columns() -> Vec<(Transport, usize, Placement, &'static str)> {
    let together = Placement { server: Some(0), client: Some(0) };
    let apart = Placement { server: Some(1), client: Some(0) };
    let mut columns = Vec::new();
    for workers in [1, 2] {
        columns.push((Transport::Dev, workers, ANYWHERE, "anywhere"));
        columns.push((Transport::Dev, workers, together, "one cpu"));
        columns.push((Transport::Dev, workers, apart, "two cpus"));
    }
    if !fuse::uring_enabled() {
        println!("io_uring is not enabled: /sys/module/fuse/parameters/enable_uring");
        return columns;
    }
    columns.push((Transport::Uring, 0, ANYWHERE, "anywhere"));
    columns.push((Transport::Uring, 0, together, "cpu 0"));
    columns.push((Transport::Uring, 0, Placement { server: None, client: Some(1) }, "cpu 1"));
    columns
}

fn bare(work: Work) -> Measured {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("bare");
    File::create(&path).unwrap();
    measure(&path, work, None)
}

fn report(name: &str, work: Work, measured: &Measured) {
    if work == Work::Idle {
        let cpu = measured.server.as_secs_f64() / (RUNS as f64 * IDLE.as_secs_f64());
        println!("{name:24} {:>41.2} % of a CPU, mount and client's start", cpu * 100.0);
        return;
    }
    let mut times: Vec<f64> =
        measured.times.iter().map(|nanos| nanos.unsigned_abs() as f64 / 1000.0).collect();
    times.sort_by(f64::total_cmp);
    let calls = times.len() as f64;
    let mean = times.iter().sum::<f64>() / calls;
    let (median, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    let moved = measured.times.iter().filter(|nanos| **nanos < 0).count() as f64 * 100.0 / calls;
    let cpu = (measured.server + measured.clients).as_secs_f64() * 1e6 / calls;
    println!("{name:24} {median:8.1} {mean:7.1} {p99:7.1} {moved:6.1}% {cpu:7.1}");
}
