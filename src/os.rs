//! Every call that changes a file, each with a label that a test can make fail.
//!
//! A label names the step and the file, such as `"apply:database"`. Tests arm a fault for a label
//! ([`fault`]); unarmed, a call costs one relaxed load more than the system call. Reads are not
//! here: std's are used as they are.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

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

/// Faults that tests inject into the calls of this module.
pub mod fault {
    use std::cell::RefCell;
    use std::io;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// How many faults are armed.
    static ARMED: AtomicUsize = AtomicUsize::new(0);
    /// The armed fault, or none.
    static FAULT: Mutex<Option<Fault>> = Mutex::new(None);

    /// What a test does in the middle of a call.
    type Hook = Box<dyn FnOnce()>;

    thread_local! {
        /// The faults that are armed for this thread's calls.
        static FAULTS_HERE: RefCell<Vec<Fault>> = const { RefCell::new(Vec::new()) };
        /// What is done at this thread's next call with that label.
        static HOOKS_HERE: RefCell<Vec<(String, Hook)>> = const { RefCell::new(Vec::new()) };
    }

    /// What to do to which call.
    #[derive(Debug, Clone)]
    pub struct Fault {
        /// The label; calls whose label starts with it are counted.
        pub label: String,
        /// How many counted calls still succeed before one fails.
        pub after: u32,
        /// The errno of the failing call.
        pub errno: i32,
    }

    /// Arms a fault; it fires once. Replaces an armed one.
    pub fn arm(fault: Fault) {
        replace(&mut FAULT.lock().unwrap(), Some(fault));
    }

    /// Takes the fault back; whether it was still waiting to fire.
    pub fn disarm() -> bool {
        replace(&mut FAULT.lock().unwrap(), None)
    }

    /// As [`arm`], but only for calls of this thread, so that tests do not meet; beside those that are
    /// armed here already.
    pub fn arm_here(fault: Fault) {
        ARMED.fetch_add(1, Ordering::SeqCst);
        FAULTS_HERE.with_borrow_mut(|armed| armed.push(fault));
    }

    /// Takes all of [`arm_here`] back; whether any was still waiting to fire.
    pub fn disarm_here() -> bool {
        let waiting = FAULTS_HERE.take().len();
        ARMED.fetch_sub(waiting, Ordering::SeqCst);
        waiting > 0
    }

    /// Has `hook` called before this thread's next call whose label starts with `label`.
    pub fn meanwhile(label: &str, hook: impl FnOnce() + 'static) {
        ARMED.fetch_add(1, Ordering::SeqCst);
        HOOKS_HERE.with_borrow_mut(|hooks| hooks.push((label.to_owned(), Box::new(hook))));
    }

    pub(super) fn check(label: &str) -> io::Result<()> {
        if ARMED.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        let hook = HOOKS_HERE.with_borrow_mut(|hooks| {
            let due = hooks.iter().position(|(start, _)| label.starts_with(start.as_str()))?;
            Some(hooks.swap_remove(due).1)
        });
        if let Some(hook) = hook {
            ARMED.fetch_sub(1, Ordering::SeqCst);
            hook();
        }
        let here = FAULTS_HERE.with_borrow_mut(|armed| {
            let due = armed.iter_mut().position(|fault| is_due(fault, label))?;
            Some(armed.swap_remove(due))
        });
        let fault = here.or_else(|| FAULT.lock().unwrap().take_if(|fault| is_due(fault, label)));
        let Some(fault) = fault else { return Ok(()) };
        ARMED.fetch_sub(1, Ordering::SeqCst);
        Err(io::Error::from_raw_os_error(fault.errno))
    }

    /// Puts another fault in the place of one; whether one was armed.
    fn replace(armed: &mut Option<Fault>, fault: Option<Fault>) -> bool {
        let (before, after) = (armed.is_some(), fault.is_some());
        *armed = fault;
        ARMED.fetch_add(usize::from(after), Ordering::SeqCst);
        ARMED.fetch_sub(usize::from(before), Ordering::SeqCst);
        before
    }

    /// Counts a call; whether it is the one to fail.
    fn is_due(fault: &mut Fault, label: &str) -> bool {
        if !label.starts_with(&fault.label) {
            return false;
        }
        let due = fault.after == 0;
        fault.after = fault.after.saturating_sub(1);
        due
    }
}

/// Makes a new file, open for reading and writing; one that exists is an error.
pub fn create_new(label: &str, path: &Path) -> io::Result<File> {
    fault::check(label)?;
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o666).open(path)
}

/// Opens a file for reading and writing and makes it if it is missing; its content stays.
pub fn open_or_create(label: &str, path: &Path) -> io::Result<File> {
    fault::check(label)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o666).open(path)
}

/// Opens an existing file for reading and writing.
pub fn open(label: &str, path: &Path) -> io::Result<File> {
    fault::check(label)?;
    OpenOptions::new().read(true).write(true).open(path)
}

/// Writes all of `data` at `offset` (bytes).
pub fn write_at(label: &str, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    fault::check(label)?;
    file.write_all_at(data, offset)
}

/// Reads at `offset` until `buf` is full or the file ends; how many bytes.
pub fn read_up_to(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match file.read_at(&mut buf[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Sets the length of a file in bytes.
pub fn truncate(label: &str, file: &File, len: u64) -> io::Result<()> {
    fault::check(label)?;
    file.set_len(len)
}

/// Makes a file's content and length durable (fdatasync).
pub fn sync(label: &str, file: &File) -> io::Result<()> {
    fault::check(label)?;
    count_sync(label);
    file.sync_data()
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
    fault::check(label)?;
    count_sync(label);
    Ok(nix::unistd::syncfs(File::open(path)?)?)
}

/// Makes the names in a directory durable.
pub fn sync_dir(label: &str, dir: &Path) -> io::Result<()> {
    fault::check(label)?;
    count_sync(label);
    File::open(dir)?.sync_all()
}

/// Renames a file, replacing what has the new name.
#[expect(clippy::disallowed_methods, reason = "this is the module that may")]
pub fn rename(label: &str, from: &Path, to: &Path) -> io::Result<()> {
    fault::check(label)?;
    fs::rename(from, to)
}

/// Copies a file to a new one, durably, with what the kernel has for that (shared blocks, where the
/// file system can).
pub fn copy(label: &str, from: &Path, to: &Path) -> io::Result<()> {
    let target = create_new(label, to)?;
    fault::check(label)?;
    io::copy(&mut File::open(from)?, &mut &target)?;
    sync(label, &target)
}

/// Says when a file was changed last.
pub fn set_modified(label: &str, path: &Path, time: SystemTime) -> io::Result<()> {
    fault::check(label)?;
    File::open(path)?.set_modified(time)
}

/// Has the file system refuse every change of a file from now on, also through open descriptors where
/// it can do that.
pub fn make_immutable(label: &str, file: &File) -> io::Result<()> {
    fault::check(label)?;
    let flags = rustix::fs::ioctl_getflags(file)?;
    Ok(rustix::fs::ioctl_setflags(file, flags | rustix::fs::IFlags::IMMUTABLE)?)
}

/// Removes a file; a missing one is an error.
#[expect(clippy::disallowed_methods, reason = "this is the module that may")]
pub fn remove(label: &str, path: &Path) -> io::Result<()> {
    fault::check(label)?;
    fs::remove_file(path)
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
    fault::check(label)?;
    fs::create_dir_all(path)
}

/// Replaces the file `path` by `content` so that a crash leaves the old or the new one: a temporary
/// file beside it, written, synced, renamed, and the directory synced.
pub fn write_atomic(label: &str, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = Path::new(&name);
    remove_if_present(label, temporary)?;
    let mut file = create_new(label, temporary)?;
    fault::check(label)?;
    file.write_all(content)?;
    sync(label, &file)?;
    rename(label, temporary, path)?;
    sync_dir(label, path.parent().unwrap_or(Path::new(".")))
}

/// A new file without a name in `dir`, open for reading and writing; it goes when it is closed.
pub fn unnamed_file(label: &str, dir: &Path) -> io::Result<File> {
    fault::check(label)?;
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir)
}

/// Reads a file from its start, whoever else uses the same open file.
#[derive(Debug)]
pub struct FileCursor<'a> {
    file: &'a File,
    offset: u64,
}

impl<'a> FileCursor<'a> {
    /// At the start of `file`.
    pub fn new(file: &'a File) -> FileCursor<'a> {
        FileCursor { file, offset: 0 }
    }
}

impl io::Read for FileCursor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.offset)?;
        self.offset += n as u64;
        Ok(n)
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
        fault::check(self.label)?;
        self.file.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
