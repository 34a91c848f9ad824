//! What a node did to its data directory, call by call, and what a disk may hold of it: all of it after
//! a crash; after a power loss what was synced, and any part of the rest.
//!
//! The model of a disk: content and length of a file are durable by a sync of the file, names by a sync
//! of their directory. What is not may be lost or kept, in any order, each 512 bytes for themselves, at
//! any state between that they had. Names are kept in the order in which they were made (a journal), or
//! in any order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, SystemTime};

use litefs::os::fault::{self, Call, Verdict, Watch, Watching};

use crate::support::chance::Chance;

/// What a disk writes whole.
const SECTOR: usize = 512;

/// What happened, in order.
#[derive(Debug, Clone)]
pub enum Step {
    Make(usize, Option<PathBuf>),
    Write(usize, u64, Vec<u8>),
    Truncate(usize, u64),
    /// Covers the steps before a number.
    Sync(usize, usize),
    SyncDir(PathBuf, usize),
    SyncAll(usize),
    Rename(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Remove(PathBuf),
    MakeDir(PathBuf),
    /// The client begins something.
    Begin(usize),
    /// The client was told how it ended.
    End(usize, Ended),
}

/// How something that a client began has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Done,
    Refused,
}

/// What to do to the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// One call fails.
    Errno(i32),
    /// One write ends early, and the next call of its thread fails.
    ShortAndFull,
    /// One write ends early.
    Short,
    /// From one call on, everything that needs room fails.
    Full,
}

/// All files of a directory.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    files: Vec<Vec<u8>>,
    names: BTreeMap<PathBuf, usize>,
    dirs: BTreeSet<PathBuf>,
    /// When each file was changed last, in steps.
    changed: Vec<usize>,
    /// So many steps are one moment to the clock; 0 is 1.
    tick: usize,
}

/// Clocks of file systems move with the timer of the kernel: much may happen in one tick.
const TICKS: [usize; 3] = [1, 10, usize::MAX];

impl Disk {
    /// What stands below `root` now.
    pub fn load(root: &Path) -> Disk {
        let mut disk = Disk::default();
        disk.load_dir(root, Path::new(""));
        disk
    }

    fn load_dir(&mut self, root: &Path, dir: &Path) {
        for entry in fs::read_dir(root.join(dir)).unwrap() {
            let entry = entry.unwrap();
            let name = dir.join(entry.file_name());
            if entry.path().is_dir() {
                self.dirs.insert(name.clone());
                self.load_dir(root, &name);
            } else {
                self.names.insert(name, self.files.len());
                self.files.push(fs::read(entry.path()).unwrap());
                self.changed.push(0);
            }
        }
    }

    /// Makes it the content of `root`.
    pub fn store(&self, root: &Path) {
        for dir in &self.dirs {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for (name, file) in &self.names {
            let path = root.join(name);
            if !path.parent().unwrap().is_dir() {
                continue; // The name of its directory is lost.
            }
            fs::write(&path, &self.files[*file]).unwrap();
            let time =
                Duration::from_secs(1_700_000_000) + Duration::from_millis(self.time_of(*file));
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_modified(SystemTime::UNIX_EPOCH + time)
                .unwrap();
        }
    }

    /// All of it happened in one moment of the clock.
    pub fn in_one_tick(self) -> Disk {
        Disk { tick: usize::MAX, ..self }
    }

    fn time_of(&self, file: usize) -> u64 {
        (self.changed[file] / self.tick.max(1)) as u64
    }

    /// What a file holds.
    pub fn content(&self, name: &str) -> Option<&[u8]> {
        self.names.get(Path::new(name)).map(|file| &self.files[*file][..])
    }

    fn make(&mut self, file: usize) {
        while self.files.len() <= file {
            self.files.push(Vec::new());
            self.changed.push(0);
        }
    }

    fn name_step(&mut self, step: &Step) {
        match step {
            Step::Make(file, Some(name)) => _ = self.names.insert(name.clone(), *file),
            Step::Remove(name) => _ = self.names.remove(name),
            Step::MakeDir(name) => _ = self.dirs.insert(name.clone()),
            _ => {}
        }
    }

    /// All that was done up to step `end`.
    pub fn after_crash(base: &Disk, steps: &[Step], end: usize) -> Disk {
        let mut disk = base.clone();
        for (at, step) in steps[..end].iter().enumerate() {
            match step {
                Step::Make(file, _) => {
                    disk.make(*file);
                    disk.name_step(step);
                }
                Step::Write(file, ..) | Step::Truncate(file, _) => {
                    apply(&mut disk.files[*file], step);
                    disk.changed[*file] = at + 1;
                }
                Step::Rename(from, to) => {
                    let file = disk.names.remove(from).expect("a file that is renamed");
                    disk.names.insert(to.clone(), file);
                }
                Step::Link(from, to) => {
                    let file = disk.names[from];
                    disk.names.insert(to.clone(), file);
                }
                _ => disk.name_step(step),
            }
        }
        disk
    }

    /// What may be left if the power is lost after step `end`.
    pub fn after_power_loss(
        base: &Disk,
        steps: &[Step],
        end: usize,
        loss: Loss,
        chance: &mut Chance,
    ) -> Disk {
        let steps = &steps[..end];
        let whole = Disk::after_crash(base, steps, end);
        let mut disk = base.clone();
        disk.make(whole.files.len().saturating_sub(1));
        disk.tick = TICKS[chance.below(TICKS.len() as u64) as usize];
        for file in 0..whole.files.len() {
            (disk.files[file], disk.changed[file]) = file_left(base, steps, file, loss, chance);
        }
        disk.keep_names(steps, loss, chance);
        disk
    }

    fn keep_names(&mut self, steps: &[Step], loss: Loss, chance: &mut Chance) {
        let ops: Vec<usize> = (0..steps.len()).filter(|at| changes_names(&steps[*at])).collect();
        let prefix = chance.below(ops.len() as u64 + 1) as usize;
        // A file has its number also where its first name is lost.
        let mut now = BTreeMap::new();
        for (number, at) in ops.iter().enumerate() {
            let keep = match loss.names {
                Names::Lost => false,
                Names::Kept => true,
                Names::InOrder => number < prefix,
                Names::Any => chance.below(2) == 0,
            };
            let step = &steps[*at];
            let file = match step {
                Step::Make(file, Some(name)) => {
                    now.insert(name.clone(), *file);
                    None
                }
                Step::Rename(from, to) => {
                    let file = now.remove(from).or_else(|| self.names.get(from).copied());
                    now.insert(to.clone(), file.expect("a file that is renamed"));
                    file
                }
                Step::Link(from, to) => {
                    let file = now.get(from).or_else(|| self.names.get(from)).copied();
                    now.insert(to.clone(), file.expect("a file that gets another name"));
                    file
                }
                _ => None,
            };
            if !keep && !is_name_durable(steps, *at) {
                continue;
            }
            match (step, file) {
                (Step::Rename(from, to), Some(file)) => {
                    if self.names.get(from) == Some(&file) {
                        self.names.remove(from);
                    }
                    self.names.insert(to.clone(), file);
                }
                (Step::Link(_, to), Some(file)) => _ = self.names.insert(to.clone(), file),
                _ => self.name_step(step),
            }
        }
    }
}

fn changes_names(step: &Step) -> bool {
    let is_named = matches!(step, Step::Make(_, Some(_)) | Step::Rename(..) | Step::Link(..));
    is_named || matches!(step, Step::Remove(_) | Step::MakeDir(_))
}

/// Whether a directory was synced after the step at `at` changed its names.
fn is_name_durable(steps: &[Step], at: usize) -> bool {
    let parents = match &steps[at] {
        Step::Make(_, Some(name)) | Step::Remove(name) | Step::MakeDir(name) => [name, name],
        Step::Rename(from, to) => [from, to],
        Step::Link(_, to) => [to, to],
        _ => return true,
    };
    let parents = parents.map(|name| name.parent().unwrap());
    steps[at..].iter().any(|step| match step {
        Step::SyncDir(dir, upto) => *upto > at && parents.contains(&dir.as_path()),
        Step::SyncAll(upto) => *upto > at,
        _ => false,
    })
}

/// How much is lost.
#[derive(Debug, Clone, Copy)]
pub struct Loss {
    pub content: Content,
    pub names: Names,
}

/// What is left of the content that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    Lost,
    Kept,
    /// A part of the calls, in order; the last one torn.
    InOrder,
    /// Any part.
    Any,
}

/// What is left of the names that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    Lost,
    Kept,
    InOrder,
    Any,
}

impl Loss {
    /// Each kind in turn.
    pub fn nth(n: usize) -> Loss {
        const CONTENT: [Content; 5] =
            [Content::Lost, Content::Any, Content::InOrder, Content::Any, Content::Kept];
        const NAMES: [Names; 4] = [Names::Lost, Names::InOrder, Names::Kept, Names::Any];
        Loss { content: CONTENT[n % 5], names: NAMES[n % 4] }
    }
}

fn apply(content: &mut Vec<u8>, step: &Step) {
    match step {
        Step::Write(_, offset, data) => {
            let (start, end) = (*offset as usize, *offset as usize + data.len());
            if content.len() < end {
                content.resize(end, 0);
            }
            content[start..end].copy_from_slice(data);
        }
        Step::Truncate(_, len) => content.resize(*len as usize, 0),
        _ => {}
    }
}

/// The content of a file, and when it was changed last.
fn file_left(
    base: &Disk,
    steps: &[Step],
    file: usize,
    loss: Loss,
    chance: &mut Chance,
) -> (Vec<u8>, usize) {
    let is_its = |(_, step): &(usize, &Step)| match step {
        Step::Write(of, ..) | Step::Truncate(of, _) => *of == file,
        _ => false,
    };
    let synced = steps.iter().filter_map(|step| match step {
        Step::Sync(of, upto) if *of == file => Some(*upto),
        Step::SyncAll(upto) => Some(*upto),
        _ => None,
    });
    let durable = synced.max().unwrap_or(0);
    let mut content = base.files.get(file).cloned().unwrap_or_default();
    let is_made = |step: &Step| matches!(step, Step::Make(of, _) if *of == file);
    let made = steps.iter().position(is_made).map_or(0, |at| at + 1);
    let mut changed = base.changed.get(file).copied().unwrap_or(made);
    let mut play = |content: &mut Vec<u8>, steps: &[(usize, &Step)]| {
        steps.iter().for_each(|(_, step)| apply(content, step));
        changed = steps.last().map_or(changed, |(at, _)| at + 1);
        changed
    };
    let its: Vec<(usize, &Step)> = steps.iter().enumerate().filter(is_its).collect();
    let (before, rest) = its.split_at(its.partition_point(|(at, _)| *at < durable));
    let changed = play(&mut content, before);
    match loss.content {
        Content::Lost => (content, changed),
        Content::Kept => {
            let changed = play(&mut content, rest);
            (content, changed)
        }
        Content::InOrder => {
            let count = chance.below(rest.len() as u64 + 1) as usize;
            let changed = play(&mut content, &rest[..count]);
            if let Some((_, Step::Write(_, offset, data))) = rest.get(count) {
                let sectors = data.len().div_ceil(SECTOR) as u64;
                let end = (chance.below(sectors + 1) as usize * SECTOR).min(data.len());
                apply(&mut content, &Step::Write(file, *offset, data[..end].to_vec()));
            }
            (content, changed)
        }
        Content::Any => {
            let (content, last) = any_part(content, rest, chance);
            (content, last.map_or(changed, |last| rest[last].0 + 1))
        }
    }
}

/// Length and time of any moment, as they stand in one inode, and each sector as it was after some of
/// the steps; the number of the last step that the inode knows of. What the inode knows to be cut off
/// is gone, and what was written after a cut that it does not know of has no place in it.
fn any_part(
    mut now: Vec<u8>,
    rest: &[(usize, &Step)],
    chance: &mut Chance,
) -> (Vec<u8>, Option<usize>) {
    let steps = rest.len();
    let draw = |chance: &mut Chance, from: usize, upto: usize| match chance.below(4) {
        0 => from,
        1 => upto,
        _ => from + chance.below((upto - from) as u64 + 1) as usize,
    };
    let inode = draw(chance, 0, steps);
    // Which cuts the inode knows of, and which sectors of what states there may be.
    let mut lens = vec![now.len()];
    let mut cuts = Vec::new();
    for (number, (_, step)) in (1..).zip(rest) {
        let before = lens[number - 1];
        let len = match step {
            Step::Write(_, offset, data) => before.max(*offset as usize + data.len()),
            Step::Truncate(_, len) => *len as usize,
            _ => before,
        };
        if len < before {
            cuts.push((number, len / SECTOR));
        }
        lens.push(len);
    }
    let states_of = |sector: usize| {
        let of_it = || cuts.iter().filter(|(_, from)| *from <= sector).map(|(number, _)| *number);
        let from = of_it().filter(|number| *number <= inode).max().unwrap_or(0);
        (from, of_it().find(|number| *number > inode).map_or(steps, |number| number - 1))
    };
    let (mut out, mut until) = (now.clone(), HashMap::new());
    for (number, (_, step)) in (1..).zip(rest) {
        let before = now.len();
        apply(&mut now, step);
        let touched = match step {
            Step::Write(_, offset, data) => {
                let start = (*offset as usize).min(before);
                start / SECTOR..(*offset as usize + data.len()).div_ceil(SECTOR)
            }
            _ => now.len().min(before) / SECTOR..now.len().max(before).div_ceil(SECTOR),
        };
        for sector in touched {
            let state = until.entry(sector).or_insert_with(|| {
                let (from, upto) = states_of(sector);
                draw(chance, from, upto)
            });
            if number > *state {
                continue;
            }
            let (start, end) = (sector * SECTOR, (sector + 1) * SECTOR);
            if out.len() < end {
                out.resize(end, 0);
            }
            out[start..end].fill(0);
            if start < now.len() {
                let end = end.min(now.len());
                out[start..end].copy_from_slice(&now[start..end]);
            }
        }
    }
    out.resize(lens[inode], 0);
    (out, inode.checked_sub(1))
}

/// Records what happens below a directory, and makes trouble.
pub struct Recorder {
    root: PathBuf,
    pub base: Disk,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    steps: Vec<Step>,
    files: usize,
    /// By inode.
    known: HashMap<u64, usize>,
    /// The number of steps when a call began.
    begun: HashMap<ThreadId, usize>,
    /// Directories that a call is about to make.
    missing: HashMap<ThreadId, Vec<PathBuf>>,
    calls: usize,
    trouble: Option<(usize, Trouble)>,
    /// The label of each call.
    labels: Vec<String>,
    /// Threads whose next call fails.
    full: Vec<ThreadId>,
    /// What was hit.
    hit: Option<String>,
}

impl Recorder {
    /// Watches `root` from now on.
    pub fn start(root: &Path, trouble: Option<(usize, Trouble)>) -> (Arc<Recorder>, Watching) {
        let base = Disk::load(root);
        let mut known = HashMap::new();
        for (name, file) in &base.names {
            known.insert(fs::metadata(root.join(name)).unwrap().ino(), *file);
        }
        let files = base.files.len();
        let state = State { files, known, trouble, ..State::default() };
        let recorder = Recorder { root: root.to_owned(), base, state: Mutex::new(state) };
        let recorder = Arc::new(recorder);
        let watching = fault::watch(root, recorder.clone());
        (recorder, watching)
    }

    /// The label of each call.
    pub fn labels(&self) -> Vec<String> {
        self.state.lock().unwrap().labels.clone()
    }

    /// The label of the call that was hit.
    pub fn hit(&self) -> Option<String> {
        self.state.lock().unwrap().hit.clone()
    }

    /// No trouble any more.
    pub fn calm(&self) {
        self.state.lock().unwrap().trouble = None;
    }

    /// What happened so far.
    pub fn steps(&self) -> Vec<Step> {
        self.state.lock().unwrap().steps.clone()
    }

    /// Notes what the client does.
    pub fn note(&self, step: Step) {
        self.state.lock().unwrap().steps.push(step);
    }

    fn name(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap().to_owned()
    }
}

impl State {
    fn verdict(&mut self, label: &str, call: &Call<'_>) -> Verdict {
        let (number, thread) = (self.calls, std::thread::current().id());
        self.calls += 1;
        self.labels.push(label.to_owned());
        if let Some(at) = self.full.iter().position(|one| *one == thread) {
            self.full.swap_remove(at);
            return Verdict::Fail(libc::ENOSPC);
        }
        let Some((due, trouble)) = self.trouble else { return Verdict::Go };
        if number < due || (number > due && trouble != Trouble::Full) {
            return Verdict::Go;
        }
        self.hit.get_or_insert_with(|| format!("{label}: {}", describe(call)));
        match (trouble, call) {
            (Trouble::Errno(errno), _) => Verdict::Fail(errno),
            (
                Trouble::Full,
                Call::Write(..)
                | Call::Make(..)
                | Call::Copy(..)
                | Call::Link(..)
                | Call::MakeDirs(_),
            ) => Verdict::Fail(libc::ENOSPC),
            (Trouble::Full, _) => Verdict::Go,
            (Trouble::Short, Call::Write(_, _, data)) => Verdict::Short((data.len() / 2).max(1)),
            (Trouble::ShortAndFull, Call::Write(_, _, data)) => {
                self.full.push(thread);
                Verdict::Short((data.len() / 2).max(1))
            }
            (Trouble::Short | Trouble::ShortAndFull, _) => Verdict::Go,
        }
    }

    fn file(&self, file: &File) -> Option<usize> {
        self.known.get(&file.metadata().unwrap().ino()).copied()
    }
}

fn describe(call: &Call<'_>) -> String {
    let kind = match call {
        Call::Open(_) => "open",
        Call::Make(..) => "make",
        Call::Write(..) => "write",
        Call::Copy(..) => "copy",
        Call::Truncate(..) => "truncate",
        Call::Sync(_) => "sync",
        Call::SyncFs(_) => "syncfs",
        Call::SyncDir(_) => "sync dir",
        Call::Rename(..) => "rename",
        Call::Link(..) => "link",
        Call::Remove(_) => "remove",
        Call::MakeDirs(_) => "make dirs",
        Call::Mark(_) => "mark",
    };
    let path = call.path().unwrap_or_default();
    format!("{kind} {}", path.file_name().unwrap_or_default().to_string_lossy())
}

impl Watch for Recorder {
    fn before(&self, label: &str, call: &Call<'_>) -> Verdict {
        let mut state = self.state.lock().unwrap();
        let (thread, steps) = (std::thread::current().id(), state.steps.len());
        state.begun.insert(thread, steps);
        if let Call::MakeDirs(path) = call {
            let missing = path.ancestors().take_while(|path| !path.exists());
            let missing = missing.map(|path| self.name(path)).collect();
            state.missing.insert(thread, missing);
        }
        state.verdict(label, call)
    }

    fn after(&self, _label: &str, call: &Call<'_>) {
        let mut state = self.state.lock().unwrap();
        let thread = std::thread::current().id();
        let begun = state.begun.get(&thread).copied().unwrap_or(0);
        match call {
            Call::Make(name, _, file) => {
                let number = state.files;
                state.files += 1;
                state.known.insert(file.unwrap().metadata().unwrap().ino(), number);
                state.steps.push(Step::Make(number, name.map(|name| self.name(name))));
            }
            Call::Write(file, offset, data) => {
                let Some(number) = state.file(file) else { return };
                state.steps.push(Step::Write(number, *offset, data.to_vec()));
            }
            Call::Copy(file, path) => {
                let Some(number) = state.file(file) else { return };
                state.steps.push(Step::Truncate(number, 0));
                state.steps.push(Step::Write(number, 0, fs::read(path).unwrap()));
            }
            Call::Truncate(file, len) => {
                let Some(number) = state.file(file) else { return };
                state.steps.push(Step::Truncate(number, *len));
            }
            Call::Sync(file) => {
                let Some(number) = state.file(file) else { return };
                state.steps.push(Step::Sync(number, begun));
            }
            Call::SyncFs(_) => state.steps.push(Step::SyncAll(begun)),
            Call::SyncDir(path) => {
                let name = self.name(path);
                state.steps.push(Step::SyncDir(name, begun));
            }
            Call::Rename(from, to) => {
                let (from, to) = (self.name(from), self.name(to));
                state.steps.push(Step::Rename(from, to));
            }
            Call::Link(from, to) => {
                let (from, to) = (self.name(from), self.name(to));
                state.steps.push(Step::Link(from, to));
            }
            Call::Remove(path) => {
                let name = self.name(path);
                state.steps.push(Step::Remove(name));
            }
            Call::MakeDirs(_) => {
                let missing = state.missing.remove(&thread).unwrap_or_default();
                state.steps.extend(missing.into_iter().rev().map(Step::MakeDir));
            }
            Call::Open(_) | Call::Mark(_) => {}
        }
    }
}
