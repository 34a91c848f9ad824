//! Reading, writing, sizes, names and mmap on a mounted directory, with passthrough and without.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fuse::Transport;
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};

use crate::volume::{EVERY, Mounted, TRANSPORTS, Way, mounted, wait_for};

fn create(mounted: &Mounted, name: &str) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).open(mounted.path(name)).unwrap()
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn what_is_written_is_read_and_stands_in_the_backing_file() {
    for (transport, way) in EVERY {
        let mounted = mounted(transport, way);
        let mut file = create(&mounted, "db");
        let content: Vec<u8> = (0..3_000_000u32).map(|number| (number % 251) as u8).collect();
        file.write_all(&content).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut back = Vec::new();
        file.read_to_end(&mut back).unwrap();
        assert!(back == content, "{transport:?} {way:?}");
        assert!(std::fs::read(mounted.backing("db")).unwrap() == content, "{transport:?} {way:?}");
        assert_eq!(file.metadata().unwrap().len(), content.len() as u64, "{transport:?} {way:?}");
        let went_to_us = mounted.volume.calls("write") > 0;
        assert_eq!(went_to_us, way != Way::Passthrough, "{transport:?} {way:?}");
        drop(file);
        wait_for("release", || mounted.volume.calls("release") == 1);
        // The kernel releases the file a moment before it lets go of the mount.
        wait_for("unmount", || mounted.mount.unmount().is_ok());
    }
}

#[test]
fn a_large_write_comes_in_large_pieces() {
    for (transport, pieces) in [(Transport::Dev, 4), (Transport::Uring, 32)] {
        let mounted = mounted(transport, Way::Direct);
        create(&mounted, "db").write_all(&vec![7; 4 << 20]).unwrap();
        // One more if the memory does not begin on a page.
        assert!((pieces..=pieces + 1).contains(&mounted.volume.calls("write")));
    }
}

#[test]
fn truncation_comes_as_a_new_size() {
    for (transport, way) in EVERY {
        let mounted = mounted(transport, way);
        let mut file = create(&mounted, "db");
        file.write_all(b"0123456789").unwrap();
        file.set_len(4).unwrap();
        assert_eq!(std::fs::read(mounted.path("db")).unwrap(), b"0123", "{transport:?} {way:?}");
        let before = mounted.volume.calls("setattr");
        drop(File::create(mounted.path("db")).unwrap());
        assert_eq!(mounted.volume.calls("setattr"), before + 1, "O_TRUNC, {transport:?} {way:?}");
        assert_eq!(mounted.backing("db").metadata().unwrap().len(), 0, "{transport:?} {way:?}");
    }
}

#[test]
fn an_unlinked_file_lives_until_it_is_closed() {
    for (transport, way) in EVERY {
        let mounted = mounted(transport, way);
        let mut file = create(&mounted, "db");
        nix::unistd::unlink(&mounted.path("db")).unwrap();
        file.write_all(b"still here").unwrap();
        let mut back = [0; 10];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(&back, b"still here", "{transport:?} {way:?}");
        let missing = File::open(mounted.path("db")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{transport:?} {way:?}");
        let mut second = create(&mounted, "db");
        second.write_all(b"another").unwrap();
        assert_eq!(std::fs::read(mounted.path("db")).unwrap(), b"another", "{transport:?} {way:?}");
    }
}

#[test]
fn a_listing_names_every_file() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let expected: BTreeSet<String> = (0..500).map(|number| format!("file-{number}")).collect();
        expected.iter().for_each(|name| drop(create(&mounted, name)));
        assert_eq!(names(&mounted.dir), expected);
        nix::unistd::unlink(&mounted.path("file-7")).unwrap();
        assert_eq!(names(&mounted.dir).len(), 499);
    }
}

#[test]
fn numbers_of_the_file_system_are_those_of_the_volume() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let stat = nix::sys::statvfs::statvfs(&mounted.dir).unwrap();
        let expected = nix::sys::statvfs::statvfs(&mounted.volume.backing).unwrap();
        assert_eq!(stat.blocks(), expected.blocks());
        assert_eq!(stat.name_max(), expected.name_max());
        assert_eq!(stat.fragment_size(), expected.fragment_size());
    }
}

#[test]
fn fsync_reaches_the_volume() {
    for (transport, way) in EVERY {
        let mounted = mounted(transport, way);
        let file = create(&mounted, "db");
        file.sync_all().unwrap();
        file.sync_data().unwrap();
        File::open(&mounted.dir).unwrap().sync_all().unwrap();
        let calls = ["fsync", "fdatasync", "fsync_dir"].map(|name| mounted.volume.calls(name));
        assert_eq!(calls, [1, 1, 1], "{transport:?} {way:?}");
    }
}

#[test]
fn a_missing_name_is_asked_for_again_unless_remembered() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let lookups = |name: &str| {
            let before = mounted.volume.calls("lookup");
            for _ in 0..3 {
                assert!(!mounted.path(name).exists());
            }
            mounted.volume.calls("lookup") - before
        };
        assert_eq!(lookups("missing"), 3);
        assert_eq!(lookups("remembered-missing"), 1);
    }
}

#[test]
fn what_has_no_meaning_here_is_refused() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let file = create(&mounted, "db");
        let errno = |result: nix::Result<()>| result.unwrap_err();
        let other = mounted.path("other");
        let mkdir = nix::unistd::mkdir(&other, nix::sys::stat::Mode::S_IRWXU);
        assert_eq!(errno(mkdir), Errno::EPERM);
        assert_eq!(
            errno(nix::unistd::linkat(
                nix::fcntl::AT_FDCWD,
                &mounted.path("db"),
                nix::fcntl::AT_FDCWD,
                &other,
                nix::fcntl::AtFlags::empty(),
            )),
            Errno::EPERM
        );
        let symlink = nix::unistd::symlinkat(&mounted.path("db"), nix::fcntl::AT_FDCWD, &other);
        assert_eq!(errno(symlink), Errno::EPERM);
        let renamed = nix::fcntl::renameat(
            nix::fcntl::AT_FDCWD,
            &mounted.path("db"),
            nix::fcntl::AT_FDCWD,
            &other,
        );
        assert_eq!(errno(renamed), Errno::EPERM);
        let allocated = nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, 10);
        assert_eq!(errno(allocated), Errno::EOPNOTSUPP);
        // Mode, owner and times change without effect.
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
}

#[test]
fn a_mapping_and_the_backing_file_are_the_same_memory() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Passthrough);
        let file = create(&mounted, "db-shm");
        file.set_len(32 << 10).unwrap();
        let backing =
            OpenOptions::new().read(true).write(true).open(mounted.backing("db-shm")).unwrap();
        let len = NonZeroUsize::new(32 << 10).unwrap();
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice, unmapped below.
        let memory = unsafe { mmap(None, len, access, flags, &file, 0) }.unwrap();
        // SAFETY: the first byte of the mapping, which the file has.
        unsafe { memory.cast::<u8>().as_ptr().write_volatile(42) };
        let mut byte = [0];
        backing.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [42]);
        backing.write_all_at(&[43], 0).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { memory.cast::<u8>().as_ptr().read_volatile() }, 43);
        // SAFETY: the mapping made above, used no more.
        unsafe { munmap(memory, len.get()) }.unwrap();
    }
}

#[test]
fn pages_of_a_mapping_come_as_writes() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Cached);
        let file = create(&mounted, "db");
        file.set_len(8 << 10).unwrap();
        let len = NonZeroUsize::new(8 << 10).unwrap();
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice, unmapped below.
        let memory = unsafe { mmap(None, len, access, flags, &file, 0) }.unwrap();
        // SAFETY: a byte of the mapping, which the file has; flushed and unmapped while it exists.
        unsafe {
            memory.cast::<u8>().as_ptr().add(5000).write_volatile(42);
            msync(memory, len.get(), MsFlags::MS_SYNC).unwrap();
            munmap(memory, len.get()).unwrap();
        }
        assert_eq!(std::fs::read(mounted.backing("db")).unwrap()[5000], 42);
    }
}

#[test]
fn one_backing_file_serves_every_open_of_a_node() {
    for transport in TRANSPORTS {
        let mounted = mounted(transport, Way::Passthrough);
        let first = create(&mounted, "db");
        let others: Vec<File> = (0..50).map(|_| File::open(mounted.path("db")).unwrap()).collect();
        first.write_all_at(b"seen by all", 0).unwrap();
        for other in &others {
            let mut back = [0; 11];
            other.read_exact_at(&mut back, 0).unwrap();
            assert_eq!(&back, b"seen by all");
        }
        drop((first, others));
        wait_for("releases", || mounted.volume.calls("release") == 51);
        assert_eq!(std::fs::read(mounted.path("db")).unwrap(), b"seen by all");
        assert_eq!(mounted.volume.calls("read"), 0);
    }
}
