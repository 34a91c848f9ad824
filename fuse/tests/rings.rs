//! The choice of the transport, the CPUs of rings, and queues that are full.

use std::fs::{File, OpenOptions};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fuse::{Error, Transport};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::child::Process;
use crate::mounts::{start_mounting, start_mounting_unable};
use crate::volume::{Place, Way, mounted, options, wait_for};

/// Forbids a system call to this thread and those that it starts, as containers do, or with
/// `SECCOMP_FILTER_FLAG_TSYNC` to all threads of the process.
pub fn forbid(call: libc::c_long, flags: libc::c_ulong) {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};
    let step = |code: u32, k: u32, jf: u8| sock_filter { code: code as u16, jt: 0, jf, k };
    let refusal = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
    let mut filter = [
        // The number of the system call is the first word of what the filter sees.
        step(BPF_LD | BPF_W | BPF_ABS, 0, 0),
        step(BPF_JMP | BPF_JEQ | BPF_K, call as u32, 1),
        step(BPF_RET | BPF_K, refusal, 0),
        step(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers only.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(result, 0);
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the program and its steps live until the call returns, which copies them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    assert_eq!(result, 0);
}

/// A ring that can serve no more ends the mount, rather than that its clients wait for ever.
#[test]
fn a_mount_of_which_a_ring_fails_ends() {
    let temp = Place::new();
    let mut child = start_mounting_unable(temp.path());
    let path = temp.path().join("mount/db");
    let calls = std::thread::spawn(move || {
        while !matches!(errno(File::open(&path)), Err(Errno::ECONNABORTED | Errno::ENOTCONN)) {}
    });
    wait_for("calls to fail", || calls.is_finished());
    drop(child.stdin.take());
    child.wait().unwrap();
    let _ = nix::mount::umount(&temp.path().join("mount"));
}

fn errno(opened: std::io::Result<File>) -> Result<File, Errno> {
    opened.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))
}

#[test]
fn where_io_uring_is_forbidden_the_device_does_it() {
    // In a thread of its own, since nothing allows it again.
    let forbidden = std::thread::spawn(|| {
        forbid(libc::SYS_io_uring_setup, 0);
        let temp = Place::new();
        let volume =
            || std::sync::Arc::new(crate::volume::TempVolume::new(temp.path(), Way::Cached));
        let error = fuse::mount(volume(), options(temp.path(), Transport::Uring)).unwrap_err();
        assert!(matches!(error, Error::Uring { source: Errno::EPERM, .. }), "{error}");
        let mount = fuse::mount(volume(), options(temp.path(), Transport::Auto)).unwrap();
        assert_eq!(mount.transport(), Transport::Dev);
        File::create(temp.path().join("mount/db")).unwrap();
        wait_for("unmount", || mount.unmount().is_ok());
    });
    forbidden.join().unwrap();
}

/// The CPUs that this thread may run on.
pub fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap()).collect()
}

/// Keeps a thread, or this one for zero, on one CPU.
pub fn pin(thread: i32, cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(thread), &set).unwrap();
}

/// The process may run on one CPU, its clients on all.
#[test]
fn clients_on_cpus_that_the_process_has_not_got_are_served() {
    let cpus = cpus();
    pin(0, cpus[0]);
    let mounted = mounted(Transport::Uring, Way::Cached);
    File::create(mounted.path("db")).unwrap();
    for cpu in cpus {
        let open = format!("open {}", mounted.path("db").display());
        let mut processes: Vec<Process> = (0..10).map(|_| Process::start()).collect();
        for process in &mut processes {
            pin(process.thread, cpu);
            assert_eq!(process.tell(&open), "ok");
        }
        assert_eq!(processes[0].tell("setlk w 120 1"), "ok");
        for process in &mut processes[1..] {
            process.send("setlkw r 120 1");
        }
        wait_for("all to wait", || mounted.volume.waiting() == 9);
        assert_eq!(processes[0].tell("setlk u 120 1"), "ok");
        for process in &mut processes[1..] {
            assert_eq!(process.answer(), "ok");
        }
    }
}

/// More calls than a queue has slots wait on one CPU: some are refused, and the unlock is served.
#[test]
fn waiting_calls_never_fill_a_queue() {
    const CALLS: usize = 400;
    let mounted = mounted(Transport::Uring, Way::Cached);
    let file = File::create(mounted.path("db")).unwrap();
    let mut holder = Process::start();
    let cpu = cpus()[0];
    pin(holder.thread, cpu);
    assert_eq!(holder.tell(&format!("open {}", mounted.path("db").display())), "ok");
    assert_eq!(holder.tell("setlk w 120 1"), "ok");
    let (refused, granted) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..CALLS {
            let builder = std::thread::Builder::new().stack_size(64 << 10);
            let wait = || {
                pin(0, cpu);
                match lock_and_wait(&file) {
                    Ok(()) => granted.fetch_add(1, Ordering::Relaxed),
                    Err(Errno::ENOLCK) => refused.fetch_add(1, Ordering::Relaxed),
                    Err(errno) => panic!("{errno}"),
                };
            };
            builder.spawn_scoped(scope, wait).unwrap();
        }
        wait_for("each call to wait or to be refused", || {
            mounted.volume.waiting() + refused.load(Ordering::Relaxed) == CALLS
        });
        assert_eq!(holder.tell("setlk u 120 1"), "ok");
    });
    let (refused, granted) = (refused.into_inner(), granted.into_inner());
    assert!(refused > 0 && granted > 0, "{refused} refused, {granted} granted");
}

/// The policies of the threads that serve the rings of `process`.
fn policies(process: u32) -> Vec<libc::c_int> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let rings = tasks.filter_map(|task| {
        let path = task.unwrap().path();
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let thread: libc::pid_t = path.file_name()?.to_str()?.parse().ok()?;
        // SAFETY: takes a number.
        name.starts_with("fuse-ring-").then(|| unsafe { libc::sched_getscheduler(thread) })
    });
    rings.collect()
}

/// A client that is on another CPU with each call has a ring's thread step aside, until it rests.
#[test]
fn a_ring_steps_aside_for_a_client_that_comes_and_goes() {
    let temp = Place::new();
    let mut child = start_mounting(temp.path(), Transport::Uring);
    let path = temp.path().join("mount/db");
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let cpus = cpus();
    assert!(cpus.len() > 1, "needs two CPUs");
    let come_and_go = || {
        for cpu in &cpus[..2] {
            pin(0, *cpu);
            lock_and_wait(&file).unwrap();
        }
    };
    let some_aside = || policies(child.id()).contains(&libc::SCHED_IDLE);
    assert!(!some_aside());
    wait_for("a ring to step aside", || {
        (0..8).for_each(|_| come_and_go());
        some_aside()
    });
    wait_for("all to step back", || {
        let start = Instant::now();
        wait_for("a rest", || start.elapsed() > Duration::from_millis(20));
        come_and_go();
        !some_aside()
    });
    drop(file);
    drop(child.stdin.take());
    child.wait().unwrap();
}

fn lock_and_wait(file: &File) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 120,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLKW(&lock)).map(drop)
}
