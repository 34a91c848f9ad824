//! Every call that changes a file or reads one of a database, each with a label that a test can make
//! fail.
//!
//! A label names the step and the file, such as `"apply:database"`. Tests arm a fault for a label
//! ([`fault`]); unarmed, a call costs one relaxed load more than the system call. The reads on which
//! something is decided or written are here too, with labels that begin with `"read:"`. A call that a
//! signal interrupts is made again.

use std::borrow::Borrow;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use fault::{Call, Verdict};

pub mod fault;

/// Labels of what an application asked for.
const OF_APPLICATIONS: [&str; 3] = ["files:sync", "files:dir", "super-journal:sync"];

/// How often something was made durable since the start, for the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Syncs {
    /// Because an application asked for it.
    pub applications: u64,
    /// Of our own.
    pub own: u64,
}

static SYNCS_OF_APPLICATIONS: AtomicU64 = AtomicU64::new(0);
static SYNCS_OF_OUR_OWN: AtomicU64 = AtomicU64::new(0);

/// How often something was made durable since the start.
pub fn syncs() -> Syncs {
    Syncs {
        applications: SYNCS_OF_APPLICATIONS.load(Ordering::Relaxed),
        own: SYNCS_OF_OUR_OWN.load(Ordering::Relaxed),
    }
}

fn count_sync(label: &str) {
    let counter = match OF_APPLICATIONS.contains(&label) {
        true => &SYNCS_OF_APPLICATIONS,
        false => &SYNCS_OF_OUR_OWN,
    };
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Makes a call as a test lets it be made; `after` says what it did.
fn perform<T>(
    label: &str,
    call: Call<'_>,
    mut real: impl FnMut() -> io::Result<T>,
    after: impl Fn(&T, &dyn fault::Watch),
) -> io::Result<T> {
    if fault::is_quiet() {
        return uninterrupted(real);
    }
    fault::check(label)?;
    let Some(watch) = fault::watcher(&call) else { return uninterrupted(real) };
    let done = uninterrupted(|| match watch.before(label, &call) {
        Verdict::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
        Verdict::Go | Verdict::Short(_) => real(),
    })?;
    after(&done, &*watch);
    Ok(done)
}

/// [`perform`], where the call itself says what it did.
fn change<T>(label: &str, call: Call<'_>, real: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    perform(label, call, real, |_, watch| watch.after(label, &call))
}

/// Makes a call again that a signal has interrupted.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Writes once at `offset`; how many bytes.
fn write_some(label: &str, file: &File, data: &[u8], offset: u64) -> io::Result<usize> {
    if fault::is_quiet() {
        return uninterrupted(|| file.write_at(data, offset));
    }
    fault::check(label)?;
    let call = Call::Write(file, offset, data);
    let Some(watch) = fault::watcher(&call) else {
        return uninterrupted(|| file.write_at(data, offset));
    };
    let len = uninterrupted(|| {
        let data = match watch.before(label, &call) {
            Verdict::Fail(errno) => return Err(io::Error::from_raw_os_error(errno)),
            Verdict::Go => data,
            Verdict::Short(len) => &data[..len.min(data.len())],
        };
        file.write_at(data, offset)
    })?;
    watch.after(label, &Call::Write(file, offset, &data[..len]));
    Ok(len)
}

/// Makes a new file, open for reading and writing; one that exists is an error.
pub fn create_new(label: &str, path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o666);
    make(label, path, &options)
}

/// Opens a file for reading and writing and makes it if it is missing; its content stays.
pub fn open_or_create(label: &str, path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o666);
    if !fault::is_quiet() && path.exists() {
        return change(label, Call::Open(path), || options.open(path));
    }
    make(label, path, &options)
}

/// Opens an existing file for reading and writing.
pub fn open(label: &str, path: &Path) -> io::Result<File> {
    change(label, Call::Open(path), || OpenOptions::new().read(true).write(true).open(path))
}

fn make(label: &str, path: &Path, options: &OpenOptions) -> io::Result<File> {
    let open = || options.open(path);
    perform(label, Call::Make(Some(path), path, None), open, |file, watch| {
        watch.after(label, &Call::Make(Some(path), path, Some(file)));
    })
}

/// Writes all of `data` at `offset` (bytes).
pub fn write_at(label: &str, file: &File, mut data: &[u8], mut offset: u64) -> io::Result<()> {
    while !data.is_empty() {
        match write_some(label, file, data, offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            len => (data, offset) = (&data[len..], offset + len as u64),
        }
    }
    Ok(())
}

/// Reads once at `offset`; how many bytes.
fn read_some(label: &str, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    if fault::is_quiet() {
        return uninterrupted(|| file.read_at(buf, offset));
    }
    fault::check(label)?;
    let call = Call::Read(file, offset, buf.len());
    let Some(watch) = fault::watcher(&call) else {
        return uninterrupted(|| file.read_at(buf, offset));
    };
    uninterrupted(|| match watch.before(label, &call) {
        Verdict::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
        Verdict::Go => file.read_at(buf, offset),
        Verdict::Short(len) => {
            let len = len.min(buf.len());
            file.read_at(&mut buf[..len], offset)
        }
    })
}

/// Reads at `offset` until `buf` is full or the file ends; how many bytes.
pub fn read_up_to(label: &str, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match read_some(label, file, &mut buf[filled..], offset + filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// Fills `buf` with what stands at `offset`; behind the end of the file are zeros.
pub fn read_zero_extended(label: &str, file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let filled = read_up_to(label, file, buf, offset)?;
    buf[filled..].fill(0);
    Ok(())
}

/// Fills `buf` with what stands at `offset`; a file that ends before is an error.
pub fn read_exact_at(label: &str, file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    match read_up_to(label, file, buf, offset)? == buf.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// All of a file.
pub fn read(label: &'static str, path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    FileCursor::new(label, File::open(path)?).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// All of a file of text.
pub fn read_to_string(label: &'static str, path: &Path) -> io::Result<String> {
    let text = String::from_utf8(read(label, path)?);
    text.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Sets the length of a file in bytes.
pub fn truncate(label: &str, file: &File, len: u64) -> io::Result<()> {
    change(label, Call::Truncate(file, len), || file.set_len(len))
}

/// Makes a file's content and length durable (fdatasync).
pub fn sync(label: &str, file: &File) -> io::Result<()> {
    count_sync(label);
    change(label, Call::Sync(file), || file.sync_data())
}

/// Starts writing a file's dirty pages to the disk without waiting. Only a hint: what fails here
/// fails again in [`sync`].
pub fn start_writeback(file: &File) {
    // The whole file: advising that it will not be needed soon starts the write-back of its pages.
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    let _ = nix::fcntl::posix_fadvise(file, 0, 0, advice);
}

/// Makes everything durable that was written to the file system of `path`, a directory.
pub fn sync_fs(label: &str, path: &Path) -> io::Result<()> {
    count_sync(label);
    change(label, Call::SyncFs(path), || Ok(nix::unistd::syncfs(File::open(path)?)?))
}

/// Makes the names in a directory durable.
pub fn sync_dir(label: &str, dir: &Path) -> io::Result<()> {
    count_sync(label);
    change(label, Call::SyncDir(dir), || File::open(dir)?.sync_all())
}

/// Renames a file, replacing what has the new name.
#[expect(clippy::disallowed_methods, reason = "this is the module that may")]
pub fn rename(label: &str, from: &Path, to: &Path) -> io::Result<()> {
    change(label, Call::Rename(from, to), || fs::rename(from, to))
}

/// Gives a file another name, which nothing has, beside the one that it has.
#[expect(clippy::disallowed_methods, reason = "this is the module that may")]
pub fn link(label: &str, from: &Path, to: &Path) -> io::Result<()> {
    change(label, Call::Link(from, to), || fs::hard_link(from, to))
}

/// Copies a file to a new one, durably, with what the kernel has for that (shared blocks, where the
/// file system can).
pub fn copy(label: &str, from: &Path, to: &Path) -> io::Result<()> {
    let target = create_new(label, to)?;
    change(label, Call::Copy(&target, to), || {
        (&target).rewind()?;
        io::copy(&mut File::open(from)?, &mut &target)
    })?;
    sync(label, &target)
}

/// Says when a file was changed last.
pub fn set_modified(label: &str, path: &Path, time: SystemTime) -> io::Result<()> {
    change(label, Call::Mark(path), || File::open(path)?.set_modified(time))
}

/// Has the file system refuse every change of a file from now on, also through open descriptors where
/// it can do that.
pub fn make_immutable(label: &str, file: &File) -> io::Result<()> {
    change(label, Call::Flag(file), || {
        let flags = rustix::fs::ioctl_getflags(file)?;
        Ok(rustix::fs::ioctl_setflags(file, flags | rustix::fs::IFlags::IMMUTABLE)?)
    })
}

/// The sticky bit (inode(7)).
pub const STICKY: u32 = 0o1000;

/// Sets or takes back the sticky bit of a file.
pub fn set_sticky(label: &str, file: &File, set: bool) -> io::Result<()> {
    change(label, Call::Flag(file), || {
        let mode = file.metadata()?.permissions().mode();
        let mode = if set { mode | STICKY } else { mode & !STICKY };
        file.set_permissions(fs::Permissions::from_mode(mode))
    })
}

/// Removes a file; a missing one is an error.
#[expect(clippy::disallowed_methods, reason = "this is the module that may")]
pub fn remove(label: &str, path: &Path) -> io::Result<()> {
    change(label, Call::Remove(path), || fs::remove_file(path))
}

/// Removes a file if it is there.
pub fn remove_if_present(label: &str, path: &Path) -> io::Result<()> {
    match remove(label, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Makes a directory and its parents; one that exists is fine.
#[expect(clippy::disallowed_methods, reason = "this is the module that may")]
pub fn create_dirs(label: &str, path: &Path) -> io::Result<()> {
    change(label, Call::MakeDirs(path), || fs::create_dir_all(path))
}

/// Replaces the file `path` by `content` so that a crash leaves the old or the new one: a temporary
/// file beside it, written, synced, renamed, and the directory synced.
pub fn write_atomic(label: &str, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = Path::new(&name);
    remove_if_present(label, temporary)?;
    let file = create_new(label, temporary)?;
    write_at(label, &file, content, 0)?;
    sync(label, &file)?;
    rename(label, temporary, path)?;
    sync_dir(label, path.parent().unwrap_or(Path::new(".")))
}

/// Bytes that programs may still write to the file system of `path`; where nobody can tell, as many as they like.
pub fn free_space(path: &Path) -> u64 {
    nix::sys::statvfs::statvfs(path)
        .map_or(u64::MAX, |stat| stat.blocks_available() * stat.fragment_size())
}

/// A new file without a name in `dir`, open for reading and writing; it goes when it is closed.
pub fn unnamed_file(label: &str, dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600);
    perform(
        label,
        Call::Make(None, dir, None),
        || options.open(dir),
        |file, watch| {
            watch.after(label, &Call::Make(None, dir, Some(file)));
        },
    )
}

/// Reads a file without moving its own position, whoever else uses the same open file.
#[derive(Debug)]
pub struct FileCursor<F> {
    label: &'static str,
    file: F,
    offset: u64,
}

impl<F: Borrow<File>> FileCursor<F> {
    /// At the start of `file`.
    pub fn new(label: &'static str, file: F) -> FileCursor<F> {
        FileCursor::at(label, file, 0)
    }

    /// At this offset (bytes) of `file`.
    pub fn at(label: &'static str, file: F, offset: u64) -> FileCursor<F> {
        FileCursor { label, file, offset }
    }
}

impl<F: Borrow<File>> io::Read for FileCursor<F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = read_some(self.label, self.file.borrow(), buf, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

impl<F: Borrow<File>> io::Seek for FileCursor<F> {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        let place = match to {
            io::SeekFrom::Start(offset) => Some(offset),
            io::SeekFrom::Current(by) => self.offset.checked_add_signed(by),
            io::SeekFrom::End(by) => self.file.borrow().metadata()?.len().checked_add_signed(by),
        };
        self.offset = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.offset)
    }
}

/// A file whose writes carry a label.
#[derive(Debug)]
pub struct Labelled<'a> {
    label: &'static str,
    file: &'a File,
}

impl<'a> Labelled<'a> {
    /// Writes to `file` count as calls of `label`.
    pub fn new(label: &'static str, file: &'a File) -> Labelled<'a> {
        Labelled { label, file }
    }
}

impl io::Write for Labelled<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if fault::is_quiet() {
            return self.file.write(data);
        }
        let offset = self.file.stream_position()?;
        let len = write_some(self.label, self.file, data, offset)?;
        self.file.seek(io::SeekFrom::Start(offset + len as u64))?;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
