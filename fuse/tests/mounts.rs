//! Beginning and ending a mount: stale ones, busy ones, a volume that dies.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse::{Error, Transport};
use nix::errno::Errno;

use crate::volume::{TRANSPORTS, TempVolume, Way, directories, mounted, options, wait_for};

const VARIABLE: &str = "FUSE_TEST_MOUNT";

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

/// Aborted through fusectl, the kernel sends nothing more, not even releases.
#[test]
fn a_mount_that_is_cut_off_releases_its_files() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Direct);
        let file = File::create(mounted.path("db")).unwrap();
        let device = mounted.dir.metadata().unwrap().dev();
        let control = tempfile::tempdir().unwrap();
        let no_flags = nix::mount::MsFlags::empty();
        let kind = Some("fusectl");
        nix::mount::mount(None::<&str>, control.path(), kind, no_flags, None::<&str>).unwrap();
        let abort = control.path().join(device.to_string()).join("abort");
        let written = OpenOptions::new().write(true).open(abort).unwrap().write_all(b"1");
        nix::mount::umount(control.path()).unwrap();
        written.unwrap();
        mounted.mount.wait();
        assert_eq!(mounted.volume.calls("release"), 1);
        assert!(file.write_at(b"lost", 0).is_err());
        assert!(nix::sys::statvfs::statvfs(&mounted.dir).is_err());
        mounted.mount.unmount().unwrap();
        assert!(nix::sys::statvfs::statvfs(&mounted.dir).is_ok());
    }
}

#[test]
fn a_dropped_mount_serves_until_its_files_are_closed() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let file = File::create(mounted.path("db")).unwrap();
        let (dir, volume) = (mounted.dir.clone(), mounted.volume.clone());
        let ended = Arc::new(AtomicBool::new(false));
        let tell = ended.clone();
        mounted.mount.on_end(move || tell.store(true, Ordering::SeqCst));
        drop(mounted.mount);
        assert!(!dir.join("db").exists());
        file.write_all_at(b"late", 0).unwrap();
        assert_eq!(volume.calls("write"), 1);
        drop(file);
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

/// The mount of a killed process is taken away, unless that is not wanted.
#[test]
fn a_stale_mount_is_replaced() {
    let temp = tempfile::tempdir().unwrap();
    directories(temp.path());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "mounts::mounts_for_another_test", "--nocapture"])
        .env(VARIABLE, temp.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("is mounted")));
    let dir = temp.path().join("mount");
    assert!(dir.join("db").exists());
    assert!(dir.metadata().unwrap().is_dir());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(dir.metadata().is_ok(), "the kernel remembers the attributes");
    // ECANCELED or ECONNABORTED while the kernel still takes the connection down.
    wait_for("the kernel to cut it off", || {
        let stale = File::open(dir.join("db")).unwrap_err();
        stale.raw_os_error() == Some(libc::ENOTCONN)
    });

    let volume = || Arc::new(TempVolume::new(&temp.path().join("backing"), Way::Cached));
    let mut keep = options(temp.path(), Transport::Auto);
    keep.skip_unmount_stale = true;
    let error = fuse::mount(volume(), keep).unwrap_err();
    assert!(matches!(error, Error::Stale { .. }));
    let mount = fuse::mount(volume(), options(temp.path(), Transport::Auto)).unwrap();
    assert!(dir.metadata().unwrap().is_dir());
    mount.unmount().unwrap();
    assert!(dir.metadata().unwrap().is_dir());
}

/// Started by other tests, to be killed or to be somebody else; alone, it mounts for itself.
#[test]
fn mounts_for_another_test() {
    let own = tempfile::tempdir().unwrap();
    let variable = std::env::var_os(VARIABLE);
    let temp = variable.as_ref().map_or(own.path(), Path::new);
    directories(temp);
    let volume = Arc::new(TempVolume::new(&temp.join("backing"), Way::Cached));
    let mount = fuse::mount(volume.clone(), options(temp, Transport::Auto)).unwrap();
    let file = File::create(temp.join("mount/db")).unwrap();
    assert!(matches!(mount.unmount().unwrap_err(), Error::Busy { .. }));
    drop(file);
    if variable.is_some() {
        let passthrough = volume.kernel.get().unwrap().passthrough;
        println!("{} is mounted, passthrough: {passthrough}", temp.display());
        // Until the parent kills us or wants us to go on; also if it dies.
        std::io::stdin().lines().for_each(drop);
    }
    wait_for("unmount", || mount.unmount().is_ok());
}

/// Runs the rest of its arguments as nobody, where everybody may open the device, as is usual.
const AS_NOBODY: &str = "mknod $0/fuse c 10 229 && chmod 666 $0/fuse \
    && mount --bind $0/fuse /dev/fuse \
    && exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"";

/// Without privileges the mount is made by fusermount3, and passthrough is not to be had.
#[test]
#[allow(clippy::disallowed_methods, reason = "a test's own files")]
fn another_user_than_root_can_mount() {
    let temp = tempfile::tempdir().unwrap();
    let binary = temp.path().join("child");
    std::fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
    std::os::unix::fs::chown(temp.path(), Some(65534), Some(65534)).unwrap();
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-c", AS_NOBODY])
        .args([temp.path(), &binary])
        .args(["--exact", "mounts::mounts_for_another_test", "--nocapture"])
        .env(VARIABLE, temp.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said = lines.find(|line| line.as_ref().unwrap().contains("is mounted"));
    assert!(said.unwrap().unwrap().ends_with("passthrough: false"));
    let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", child.id())).unwrap();
    assert!(table.contains(temp.path().join("mount").to_str().unwrap()));
    assert!(table.contains("user_id=65534"));
    drop(child.stdin.take());
    lines.for_each(|line| drop(line.unwrap()));
    assert!(child.wait().unwrap().success());
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
        notifier.inval_attr(ino).unwrap();
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
        notifier.delete(mounted.volume.ino("db"), "db".as_ref()).unwrap();
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
