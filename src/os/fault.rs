//! Faults that tests inject into the calls of [`super`], and the calls as a test can watch them.
//!
//! [`arm`] makes one call with a label fail. A [`Watch`] is told of every call that changes something
//! below one directory, before and after it, and may have it fail, end early or begin anew: enough to
//! fail each call of a node in turn, and to know what a disk holds at each moment.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// A call that changes a file or a directory, or reads a file.
#[derive(Debug, Clone, Copy)]
pub enum Call<'a> {
    /// A file is opened, or made if it is missing.
    Open(&'a Path),
    /// A new file: its name, none if it has none; and the file, once there is one.
    Make(Option<&'a Path>, &'a Path, Option<&'a File>),
    /// Bytes at an offset; after the call only those that were written.
    Write(&'a File, u64, &'a [u8]),
    /// So many bytes at an offset are read; a watch hears nothing of it afterwards.
    Read(&'a File, u64, usize),
    /// The content of a file becomes that of another one.
    Copy(&'a File, &'a Path),
    /// A file gets this length.
    Truncate(&'a File, u64),
    /// Content and length become durable.
    Sync(&'a File),
    /// Everything in the file system of a directory becomes durable.
    SyncFs(&'a Path),
    /// The names in a directory become durable.
    SyncDir(&'a Path),
    /// A file gets another name.
    Rename(&'a Path, &'a Path),
    /// A file gets another name too.
    Link(&'a Path, &'a Path),
    /// A name goes.
    Remove(&'a Path),
    /// A directory and its parents, where they are missing.
    MakeDirs(&'a Path),
    /// The time of a file.
    Mark(&'a Path),
    /// The flags of a file.
    Flag(&'a File),
}

impl Call<'_> {
    /// A path of what it changes; none if that cannot be told.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Call::Write(file, ..) | Call::Copy(file, _) => path_of(file),
            Call::Truncate(file, _) | Call::Sync(file) | Call::Flag(file) => path_of(file),
            Call::Read(file, ..) => path_of(file),
            Call::Open(path) | Call::Make(_, path, _) | Call::SyncFs(path) => {
                Some(path.to_path_buf())
            }
            Call::SyncDir(path) | Call::Rename(path, _) | Call::Link(path, _) => {
                Some(path.to_path_buf())
            }
            Call::Remove(path) | Call::MakeDirs(path) | Call::Mark(path) => {
                Some(path.to_path_buf())
            }
        }
    }
}

/// Where an open file stands or stood.
fn path_of(file: &File) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is made.
    Go,
    /// It fails with this errno and changes nothing. EINTR: it is made again.
    Fail(i32),
    /// A write or a read ends after so many bytes.
    Short(usize),
}

/// Is told of every call below a directory.
pub trait Watch: Send + Sync {
    /// Before the call.
    fn before(&self, label: &str, call: &Call<'_>) -> Verdict;
    /// The call was made, and succeeded.
    fn after(&self, label: &str, call: &Call<'_>);
}

/// Who watches which directory.
static WATCHES: RwLock<Vec<(PathBuf, Arc<dyn Watch>)>> = RwLock::new(Vec::new());

/// A watch; dropped, it ends.
pub struct Watching(PathBuf);

/// Tells `watch` of every call that changes something below `dir`, by whatever thread.
pub fn watch(dir: &Path, watch: Arc<dyn Watch>) -> Watching {
    WATCHES.write().unwrap().push((dir.to_owned(), watch));
    ARMED.fetch_add(1, Ordering::SeqCst);
    Watching(dir.to_owned())
}

impl Drop for Watching {
    fn drop(&mut self) {
        WATCHES.write().unwrap().retain(|(dir, _)| *dir != self.0);
        ARMED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Who watches a call.
pub(super) fn watcher(call: &Call<'_>) -> Option<Arc<dyn Watch>> {
    let watches = WATCHES.read().unwrap();
    if watches.is_empty() {
        return None;
    }
    let path = call.path()?;
    watches.iter().find(|(dir, _)| path.starts_with(dir)).map(|(_, watch)| watch.clone())
}

/// Whether no test does anything to any call.
pub(super) fn is_quiet() -> bool {
    ARMED.load(Ordering::Relaxed) == 0
}

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
