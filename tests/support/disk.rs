//! A small file system of its own for a data directory.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in memory; unmounted when it is dropped.
pub struct Disk(PathBuf);

impl Disk {
    /// Mounts one of `size` at `dir`, which is made.
    pub fn mount(dir: &Path, size: &str) -> Disk {
        std::fs::create_dir_all(dir).unwrap();
        let disk = Disk(dir.to_owned());
        disk.call(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
        disk
    }

    /// Changes its size.
    pub fn resize(&self, size: &str) {
        self.call(&["-o", &format!("remount,size={size}")]);
    }

    /// Writes a file that leaves so many bytes free; where it is.
    pub fn fill(&self, free: u64) -> PathBuf {
        let filler = self.0.join("filler");
        let file = std::fs::File::create(&filler).unwrap();
        nix::fcntl::posix_fallocate(&file, 0, (self.free() - free) as i64).unwrap();
        filler
    }

    /// How many bytes are free.
    pub fn free(&self) -> u64 {
        let stat = nix::sys::statvfs::statvfs(&self.0).unwrap();
        stat.blocks_available() * stat.fragment_size()
    }

    #[track_caller]
    fn call(&self, arguments: &[&str]) {
        let status = Command::new("mount").args(arguments).arg(&self.0).status().unwrap();
        assert!(status.success(), "mount {arguments:?}: {status}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
