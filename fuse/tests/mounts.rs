//! Beginning and ending a mount: stale ones, busy ones, a volume that dies.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse::{Error, Transport};
use nix::errno::Errno;

use crate::child::Process;
use crate::rings::forbid;
use crate::volume::{Place, TRANSPORTS, TempVolume, Way, directories, mounted, options, wait_for};

const VARIABLE: &str = "FUSE_TEST_MOUNT";
const TRANSPORT: &str = "FUSE_TEST_TRANSPORT";
const UNABLE: &str = "FUSE_TEST_UNABLE";

#[test]
fn an_open_file_keeps_the_mount_and_the_error_says_so() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let file = File::create(mounted.path("db")).unwrap();
        let error = mounted.mount.unmount().unwrap_err();
        assert!(matches!(&error, Error::Busy { dir } if *dir == mounted.dir));
        assert!(error.to_string().contains(mounted.dir.to_str().unwrap()));
        drop(file);
        wait_for("unmount", || mounted.mount.unmount().is_ok());
        mounted.mount.unmount().unwrap();
        assert!(!mounted.path("db").exists());
    }
}

#[test]
fn a_mount_that_somebody_else_unmounts_has_ended() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let ended = Arc::new(AtomicBool::new(false));
        let tell = ended.clone();
        mounted.mount.on_end(move || tell.store(true, Ordering::SeqCst));
        assert!(!ended.load(Ordering::SeqCst));
        nix::mount::umount(&mounted.dir).unwrap();
        mounted.mount.wait();
        wait_for("the callback", || ended.load(Ordering::SeqCst));
        let tell = ended.clone();
        mounted.mount.on_end(move || tell.store(false, Ordering::SeqCst));
        assert!(!ended.load(Ordering::SeqCst), "called at once");
    }
}

/// Cuts a mount off from its process, as a person may through fusectl.
fn abort(dir: &Path) {
    let device = dir.metadata().unwrap().dev();
    let control = tempfile::tempdir().unwrap();
    let no_flags = nix::mount::MsFlags::empty();
    let kind = Some("fusectl");
    nix::mount::mount(None::<&str>, control.path(), kind, no_flags, None::<&str>).unwrap();
    let abort = control.path().join(device.to_string()).join("abort");
    let written = OpenOptions::new().write(true).open(abort).unwrap().write_all(b"1");
    // A process that another test is just starting may have the file open until its exec.
    wait_for("the control directory", || nix::mount::umount(control.path()).is_ok());
    written.unwrap();
}

/// Aborted through fusectl, the kernel sends nothing more, not even releases.
#[test]
fn a_mount_that_is_cut_off_releases_its_files() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Direct);
        let file = File::create(mounted.path("db")).unwrap();
        abort(&mounted.dir);
        mounted.mount.wait();
        assert_eq!(mounted.volume.calls("release"), 1);
        assert!(file.write_at(b"lost", 0).is_err());
        assert!(nix::sys::statvfs::statvfs(&mounted.dir).is_err());
        mounted.mount.unmount().unwrap();
        assert!(nix::sys::statvfs::statvfs(&mounted.dir).is_ok());
    }
}

/// Two processes with a file open, the second waiting for the first one's lock.
fn waiting_for_a_lock(path: &Path, is_waiting: impl Fn() -> bool) -> [Process; 2] {
    let [mut holder, mut waiter] = [Process::start(), Process::start()];
    for process in [&mut holder, &mut waiter] {
        assert_eq!(process.tell(&format!("open {}", path.display())), "ok");
    }
    assert_eq!(holder.tell("setlk w 120 1"), "ok");
    waiter.send("setlkw w 120 1");
    wait_for("the call to wait", is_waiting);
    [holder, waiter]
}

/// What a call gets when its mount goes away under it.
const CUT_OFF: [&str; 2] = ["ECONNABORTED", "ENOTCONN"];

#[test]
fn a_call_that_waits_ends_with_a_mount_that_is_cut_off() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        File::create(mounted.path("db")).unwrap();
        let [mut holder, mut waiter] =
            waiting_for_a_lock(&mounted.path("db"), || mounted.volume.waiting() == 1);
        abort(&mounted.dir);
        mounted.mount.wait();
        assert!(CUT_OFF.contains(&waiter.answer().as_str()), "{transport:?}");
        assert!(CUT_OFF.contains(&holder.tell("setlk u 120 1").as_str()), "{transport:?}");
    }
}

#[test]
fn a_dropped_mount_that_is_in_use_stays() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let file = File::create(mounted.path("db")).unwrap();
        let (dir, volume) = (mounted.dir.clone(), mounted.volume.clone());
        let ended = Arc::new(AtomicBool::new(false));
        let tell = ended.clone();
        mounted.mount.on_end(move || tell.store(true, Ordering::SeqCst));
        drop(mounted.mount);
        assert!(dir.join("db").exists());
        file.write_all_at(b"late", 0).unwrap();
        assert_eq!(volume.calls("write"), 1);
        drop(file);
        wait_for("unmount", || Command::new("umount").arg(&dir).status().unwrap().success());
        wait_for("the end", || ended.load(Ordering::SeqCst));
    }
}

#[test]
fn a_live_mount_is_not_mounted_over() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let temp = mounted.dir.parent().unwrap();
        let volume = Arc::new(TempVolume::new(temp, Way::Cached));
        let error = fuse::mount(volume, options(temp, Transport::Auto)).unwrap_err();
        assert!(matches!(error, Error::AlreadyMounted { dir } if dir == mounted.dir));
    }
}

#[test]
fn a_mount_point_must_be_a_directory() {
    let temp = tempfile::tempdir().unwrap();
    let volume = Arc::new(TempVolume::new(temp.path(), Way::Cached));
    let error = fuse::mount(volume.clone(), options(temp.path(), Transport::Auto)).unwrap_err();
    assert!(matches!(error, Error::Directory { source: Errno::ENOENT, .. }));
    File::create(temp.path().join("mount")).unwrap();
    let error = fuse::mount(volume, options(temp.path(), Transport::Auto)).unwrap_err();
    assert!(matches!(error, Error::Directory { source: Errno::ENOTDIR, .. }));
}

/// Another process that mounts below `temp`, ready.
pub fn start_mounting(temp: &Path, transport: Transport) -> Child {
    start(mounting(temp, transport))
}

/// The same with rings that can serve what they wait for, and no more.
pub fn start_mounting_unable(temp: &Path) -> Child {
    let mut command = mounting(temp, Transport::Uring);
    command.env(UNABLE, "1");
    start(command)
}

fn mounting(temp: &Path, transport: Transport) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "mounts::mounts_for_another_test", "--nocapture"])
        .env(VARIABLE, temp)
        .env(TRANSPORT, format!("{transport:?}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

fn start(mut command: Command) -> Child {
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("is mounted")));
    child
}

/// Waits until the kernel has cut a mount off whose process is gone; first it says ECANCELED or
/// ECONNABORTED.
fn wait_until_cut_off(dir: &Path) {
    wait_for("the kernel to cut it off", || {
        let stale = File::open(dir.join("db")).unwrap_err();
        stale.raw_os_error() == Some(libc::ENOTCONN)
    });
}

/// The mount of a killed process is taken away, unless that is not wanted. A program that it had
/// started lives on, and holds nothing of the mount.
#[test]
fn a_stale_mount_is_replaced() {
    for transport in TRANSPORTS {
        let temp = Place::new();
        let mut child = start_mounting(temp.path(), transport);
        let dir = temp.path().join("mount");
        assert!(dir.join("db").exists());
        assert!(dir.metadata().unwrap().is_dir());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(dir.metadata().is_ok(), "the kernel remembers the attributes");
        wait_until_cut_off(&dir);

        let volume = || Arc::new(TempVolume::new(&temp.path().join("backing"), Way::Cached));
        let mut keep = options(temp.path(), transport);
        keep.skip_unmount_stale = true;
        let error = fuse::mount(volume(), keep).unwrap_err();
        assert!(matches!(error, Error::Stale { .. }));
        let mount = fuse::mount(volume(), options(temp.path(), transport)).unwrap();
        assert!(dir.metadata().unwrap().is_dir());
        mount.unmount().unwrap();
        assert!(dir.metadata().unwrap().is_dir());
    }
}

/// A call that is under way when the process is killed fails; nobody waits for ever.
#[test]
fn a_killed_process_takes_the_calls_with_it_that_wait() {
    for transport in TRANSPORTS {
        let temp = Place::new();
        let mut child = start_mounting(temp.path(), transport);
        let dir = temp.path().join("mount");
        let waits = || File::open(dir.join("waiting-1")).is_ok();
        let [mut holder, mut waiter] = waiting_for_a_lock(&dir.join("db"), waits);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(CUT_OFF.contains(&waiter.answer().as_str()), "{transport:?}");
        wait_until_cut_off(&dir);
        assert!(CUT_OFF.contains(&holder.tell("setlk u 120 1").as_str()), "{transport:?}");
        // While those who had files open still have them.
        let volume = Arc::new(TempVolume::new(&temp.path().join("backing"), Way::Cached));
        let mount = fuse::mount(volume, options(temp.path(), transport)).unwrap();
        File::create(dir.join("new")).unwrap();
        wait_for("unmount", || mount.unmount().is_ok());
    }
}

/// Started by other tests, to be killed or to be somebody else; alone, it mounts for itself.
#[test]
fn mounts_for_another_test() {
    let own = Place::new();
    let variable = std::env::var_os(VARIABLE);
    let temp = variable.as_ref().map_or(own.path(), Path::new);
    directories(temp);
    let volume = Arc::new(TempVolume::new(&temp.join("backing"), Way::Cached));
    let transport = match std::env::var(TRANSPORT).as_deref() {
        Ok("Dev") => Transport::Dev,
        Ok("Uring") => Transport::Uring,
        _ => Transport::Auto,
    };
    let mount = fuse::mount(volume.clone(), options(temp, transport)).unwrap();
    let file = File::create(temp.join("mount/db")).unwrap();
    assert!(matches!(mount.unmount().unwrap_err(), Error::Busy { .. }));
    drop(file);
    if variable.is_some() {
        // It ends with our standard input, so it lives on when we are killed.
        let mut program = Command::new("cat").spawn().unwrap();
        assert_holds_nothing(program.id());
        let passthrough = volume.kernel.get().unwrap().passthrough;
        let transport = mount.transport();
        if std::env::var_os(UNABLE).is_some() {
            forbid(libc::SYS_io_uring_enter, libc::SECCOMP_FILTER_FLAG_TSYNC);
        }
        println!("{} is mounted, {transport:?}, passthrough: {passthrough}", temp.display());
        // Until the parent kills us or wants us to go on; also if it dies.
        std::io::stdin().lines().for_each(drop);
        program.wait().unwrap();
    }
    wait_for("unmount", || mount.unmount().is_ok());
}

/// A program that we started has nothing of a mount.
#[track_caller]
fn assert_holds_nothing(process: u32) {
    for entry in std::fs::read_dir(format!("/proc/{process}/fd")).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap_or_default();
        let target = target.to_string_lossy().into_owned();
        let is_ours = ["io_uring", "eventfd", "/dev/fuse"].iter().any(|ours| target.contains(ours));
        assert!(!is_ours, "{target} is inherited");
    }
}

/// Programs are started while requests are under way, and none of them is lost.
#[test]
fn programs_start_while_requests_are_under_way() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        File::create(mounted.path("db")).unwrap();
        let [mut holder, mut waiter] =
            waiting_for_a_lock(&mounted.path("db"), || mounted.volume.waiting() == 1);
        let path = mounted.path("db");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..1000 {
                    assert_eq!(File::open(&path).unwrap().metadata().unwrap().len(), 0);
                }
            });
            for _ in 0..20 {
                let mut program = Command::new("true");
                // SAFETY: nothing is done between fork and exec; it makes the library use fork(2).
                unsafe { std::os::unix::process::CommandExt::pre_exec(&mut program, || Ok(())) };
                assert!(program.status().unwrap().success());
            }
        });
        assert_eq!(holder.tell("setlk u 120 1"), "ok");
        assert_eq!(waiter.answer(), "ok");
    }
}

#[test]
fn two_mounts_work_side_by_side() {
    for other in TRANSPORTS {
        let mounts = [mounted(Transport::Uring, Way::Cached), mounted(other, Way::Direct)];
        let pairs = mounts.each_ref().map(|mounted| {
            File::create(mounted.path("db")).unwrap();
            waiting_for_a_lock(&mounted.path("db"), || mounted.volume.waiting() == 1)
        });
        for [mut holder, mut waiter] in pairs {
            assert_eq!(holder.tell("setlk u 120 1"), "ok");
            assert_eq!(waiter.answer(), "ok");
        }
        let [first, second] = mounts;
        wait_for("unmount", || first.mount.unmount().is_ok());
        File::create(second.path("after")).unwrap();
        wait_for("unmount", || second.mount.unmount().is_ok());
    }
}

/// Runs the rest of its arguments as nobody, with so much memory to lock as the first one says, where
/// everybody may open the device, as is usual.
const AS_NOBODY: &str = "mknod $0/fuse c 10 229 && chmod 666 $0/fuse \
    && mount --bind $0/fuse /dev/fuse && memlock=$1 && shift \
    && exec prlimit --memlock=$memlock \
       setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"";

/// Without privileges the mount is made by fusermount3, and passthrough is not to be had. io_uring
/// is, as long as its rings may be locked in memory.
#[test]
#[allow(clippy::disallowed_methods, reason = "a test's own files")]
fn another_user_than_root_can_mount() {
    for (memlock, transport) in [("1048576", "Uring"), ("0", "Dev")] {
        let temp = tempfile::tempdir().unwrap();
        let binary = temp.path().join("child");
        std::fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
        std::os::unix::fs::chown(temp.path(), Some(65534), Some(65534)).unwrap();
        fuse::enable_uring().unwrap();
        let mut child = Command::new("unshare")
            .args(["--mount", "sh", "-c", AS_NOBODY])
            .args([temp.path(), Path::new(memlock), &binary])
            .args(["--exact", "mounts::mounts_for_another_test", "--nocapture"])
            .env(VARIABLE, temp.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said = lines.find(|line| line.as_ref().unwrap().contains("is mounted"));
        let said = said.unwrap().unwrap();
        assert!(said.ends_with(&format!("{transport}, passthrough: false")), "{said}");
        let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", child.id())).unwrap();
        assert!(table.contains(temp.path().join("mount").to_str().unwrap()));
        assert!(table.contains("user_id=65534"));
        drop(child.stdin.take());
        lines.for_each(|line| drop(line.unwrap()));
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_panic_in_a_call_is_an_error_and_the_mount_goes_on() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        for _ in 0..10 {
            let error = File::create(mounted.path("panic")).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
        }
        File::create(mounted.path("db")).unwrap();
    }
}

#[test]
fn a_notification_drops_the_cached_pages() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(mounted.path("db"))
            .unwrap();
        file.write_all(b"old").unwrap();
        let read = || {
            let mut back = [0; 3];
            file.read_exact_at(&mut back, 0).unwrap();
            back
        };
        assert_eq!(&read(), b"old");
        let backing = OpenOptions::new().write(true).open(mounted.backing("db")).unwrap();
        backing.write_all_at(b"new", 0).unwrap();
        assert_eq!(&read(), b"old", "cached");
        let (ino, notifier) = (mounted.volume.ino("db"), mounted.mount.notifier());
        notifier.inval_inode(ino, -1, 0).unwrap();
        assert_eq!(&read(), b"old", "attributes only");
        notifier.inval_inode(ino, 0, 0).unwrap();
        assert_eq!(&read(), b"new");
        backing.write_all_at(b"2nd", 0).unwrap();
        notifier.post_inval_inode(ino, 0, 3);
        wait_for("the posted one", || &read() == b"2nd");
        notifier.inval_inode(4711, 0, 0).unwrap();
    }
}

#[test]
fn a_stored_byte_makes_the_file_longer_at_once() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(mounted.path("db"))
            .unwrap();
        file.write_all(b"old").unwrap();
        let backing = OpenOptions::new().write(true).open(mounted.backing("db")).unwrap();
        let (ino, notifier) = (mounted.volume.ino("db"), mounted.mount.notifier());
        for len in [4000_u64, 9000, 1 << 20] {
            let text = vec![b'x'; len as usize];
            backing.write_all_at(&text, 0).unwrap();
            notifier.inval_inode(ino, 0, len as i64).unwrap();
            notifier.store(ino, len - 1, b"x").unwrap();
            let asked = mounted.volume.calls("getattr");
            let mut back = vec![0; len as usize];
            file.read_exact_at(&mut back, 0).unwrap();
            assert!(back == text, "{len} bytes");
            assert_eq!(mounted.volume.calls("getattr"), asked, "its size was known");
        }
        notifier.store(4711, 0, b"x").unwrap();
    }
}

#[test]
fn a_notification_drops_a_name() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let missing = || mounted.path("remembered-missing").exists();
        let lookups = || mounted.volume.calls("lookup");
        assert!(!missing());
        let before = lookups();
        assert!(!missing());
        assert_eq!(lookups(), before);
        let notifier = mounted.mount.notifier();
        notifier.inval_entry("remembered-missing".as_ref()).unwrap();
        assert!(!missing());
        assert_eq!(lookups(), before + 1);
        notifier.post_inval_entry("remembered-missing".as_ref());
        wait_for("the posted one", || {
            missing();
            lookups() == before + 2
        });
        File::create(mounted.path("db")).unwrap();
        notifier.inval_entry("db".as_ref()).unwrap();
        let before = lookups();
        assert!(mounted.path("db").exists());
        assert_eq!(lookups(), before + 1);
    }
}

#[test]
fn many_threads_work_at_once() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Direct);
        std::thread::scope(|scope| {
            for thread in 0..8u8 {
                let path = mounted.path(&format!("file-{thread}"));
                scope.spawn(move || {
                    for _ in 0..50 {
                        let mut options = OpenOptions::new();
                        let file =
                            options.read(true).write(true).create_new(true).open(&path).unwrap();
                        file.write_all_at(&[thread; 100], 0).unwrap();
                        let mut back = [0; 100];
                        file.read_exact_at(&mut back, 0).unwrap();
                        assert_eq!(back, [thread; 100]);
                        drop(file);
                        nix::unistd::unlink(&path).unwrap();
                    }
                });
            }
        });
        wait_for("every release", || mounted.volume.calls("release") == 400);
    }
}
