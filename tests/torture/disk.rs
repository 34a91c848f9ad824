//! What a node did to its data directory, call by call, and what a disk may hold of it: all of it after
//! a crash; after a power loss what was synced, and any part of the rest.
//!
//! The model of a disk: content and length of a file are durable by a sync of the file, names by a sync
//! of their directory. What is not may be lost or kept, in any order, each 512 bytes for themselves, at
//! any state between that they had. Names are kept in the order in which they were made (a journal), or
//! in any order. After a sync that failed, the kernel takes what was written before for written: only
//! what is written again is made durable by a later sync.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, SystemTime};

use litefs::os::fault::{self, Call, Verdict, Watch, Watching};

use crate::support::chance::Chance;

/// The kind of a call that reads.
const READ: &str = "read";

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
    /// A sync of a file, or of all, that failed; what was written before a number is not tried again.
    SyncFailed(Option<usize>, usize),
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

impl Trouble {
    /// Whether it does anything to a call of this kind.
    pub fn concerns(self, kind: &str) -> bool {
        match self {
            Trouble::Errno(libc::ENOSPC) => kind != READ,
            Trouble::Errno(_) => true,
            Trouble::Short => kind == "write" || kind == READ,
            Trouble::ShortAndFull => kind == "write",
            Trouble::Full => ["write", "make", "copy", "link", "make dirs"].contains(&kind),
        }
    }
}

/// What to do to which call.
#[derive(Debug, Clone)]
pub struct Plan {
    pub label: String,
    /// Which of the calls with that label.
    pub nth: usize,
    pub trouble: Trouble,
}

/// A call that was made.
#[derive(Debug, Clone)]
pub struct Called {
    pub label: String,
    pub kind: &'static str,
    /// So many calls with that label were made before.
    nth: usize,
    /// So many steps were.
    begun: usize,
}

impl Called {
    /// The first call with its label.
    pub fn first(&self) -> Called {
        Called { nth: 0, ..self.clone() }
    }

    pub fn with(&self, trouble: Trouble) -> Plan {
        Plan { label: self.label.clone(), nth: self.nth, trouble }
    }
}

/// The first call that trouble came to.
#[derive(Debug, Clone)]
pub struct Hit {
    pub label: String,
    pub what: String,
    /// So many calls that change something were made up to then.
    pub calls: usize,
    /// So many steps were made before.
    pub step: usize,
    pub is_sync: bool,
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

    /// How many files were set aside.
    pub fn set_aside(&self) -> usize {
        let is_aside = |name: &&PathBuf| name.iter().any(|part| part == "lost+found");
        self.names.keys().filter(is_aside).count()
    }

    /// The names of the files in a directory, in their order.
    pub fn names_in(&self, dir: &Path) -> Vec<PathBuf> {
        self.names.keys().filter(|name| name.parent() == Some(dir)).cloned().collect()
    }

    /// A file with another content, or a new one.
    pub fn add(&mut self, name: &Path, content: Vec<u8>) {
        self.dirs.extend(name.parent().map(Path::to_owned));
        self.names.insert(name.to_owned(), self.files.len());
        self.files.push(content);
        self.changed.push(0);
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

/// The sectors that a step changes, of a file that had this length before and has that one after it.
fn touched(step: &Step, before: usize, after: usize) -> std::ops::Range<usize> {
    match step {
        Step::Write(_, offset, data) => {
            let start = (*offset as usize).min(before);
            start / SECTOR..(*offset as usize + data.len()).div_ceil(SECTOR)
        }
        _ => after.min(before) / SECTOR..after.max(before).div_ceil(SECTOR),
    }
}

fn copy_sector(from: &[u8], to: &mut Vec<u8>, sector: usize) {
    let (start, end) = (sector * SECTOR, (sector + 1) * SECTOR);
    if to.len() < end {
        to.resize(end, 0);
    }
    to[start..end].fill(0);
    if start < from.len() {
        let end = end.min(from.len());
        to[start..end].copy_from_slice(&from[start..end]);
    }
}

/// A file on the disk, and as whoever reads it sees it.
struct Halves {
    disk: Vec<u8>,
    cache: Vec<u8>,
    /// Sectors that the next sync writes.
    dirty: BTreeSet<usize>,
    /// The shortest that the file was since the last one.
    shortest: usize,
}

impl Halves {
    fn new(content: Vec<u8>) -> Halves {
        let shortest = content.len();
        Halves { disk: content.clone(), cache: content, dirty: BTreeSet::new(), shortest }
    }

    fn play(&mut self, step: &Step) {
        let before = self.cache.len();
        apply(&mut self.cache, step);
        self.dirty.extend(touched(step, before, self.cache.len()));
        self.shortest = self.shortest.min(self.cache.len());
    }

    /// A sync; one that fails leaves the length to the next one, but no content.
    fn sync(&mut self, is_done: bool) {
        let dirty = std::mem::take(&mut self.dirty);
        if !is_done {
            return;
        }
        self.disk.truncate(self.shortest);
        dirty.iter().for_each(|sector| copy_sector(&self.cache, &mut self.disk, *sector));
        self.disk.resize(self.cache.len(), 0);
        self.shortest = self.cache.len();
    }

    /// Some of what a sync that failed was to write stands on the disk all the same.
    fn keep_some(&mut self, chance: &mut Chance) {
        for sector in 0..self.cache.len().div_ceil(SECTOR) {
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(self.cache.len());
            if self.disk[range.clone()] != self.cache[range.clone()] && chance.below(2) == 0 {
                self.disk[range.clone()].copy_from_slice(&self.cache[range]);
            }
        }
    }
}

/// The syncs of a file in their order: what was written before which step, and whether it was.
fn syncs_of(steps: &[Step], file: usize) -> Vec<(usize, bool)> {
    let syncs = steps.iter().filter_map(|step| match step {
        Step::Sync(of, upto) if *of == file => Some((*upto, true)),
        Step::SyncAll(upto) => Some((*upto, true)),
        Step::SyncFailed(of, upto) if of.is_none_or(|of| of == file) => Some((*upto, false)),
        _ => None,
    });
    let mut syncs: Vec<_> = syncs.collect();
    syncs.sort_by_key(|(upto, _)| *upto);
    syncs
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
    let mut syncs = syncs_of(steps, file);
    let last_done = syncs.iter().rposition(|(_, is_done)| *is_done);
    syncs.truncate(last_done.map_or(0, |last| last + 1));
    let durable = syncs.last().map_or(0, |(upto, _)| *upto);
    let its: Vec<(usize, &Step)> = steps.iter().enumerate().filter(is_its).collect();
    let (before, rest) = its.split_at(its.partition_point(|(at, _)| *at < durable));
    let mut left = Halves::new(base.files.get(file).cloned().unwrap_or_default());
    let mut syncs = syncs.into_iter().peekable();
    for (at, step) in before {
        while let Some((_, is_done)) = syncs.next_if(|(upto, _)| upto <= at) {
            left.sync(is_done);
        }
        left.play(step);
    }
    syncs.for_each(|(_, is_done)| left.sync(is_done));
    let is_made = |step: &Step| matches!(step, Step::Make(of, _) if *of == file);
    let made = steps.iter().position(is_made).map_or(0, |at| at + 1);
    let changed = base.changed.get(file).copied().unwrap_or(made);
    let last_of = |steps: &[(usize, &Step)]| steps.last().map(|(at, _)| at + 1);
    let changed = last_of(before).unwrap_or(changed);
    match loss.content {
        Content::Lost => (left.disk, changed),
        Content::Kept => {
            rest.iter().for_each(|(_, step)| left.play(step));
            (left.cache, last_of(rest).unwrap_or(changed))
        }
        Content::InOrder => {
            let count = chance.below(rest.len() as u64 + 1) as usize;
            rest[..count].iter().for_each(|(_, step)| left.play(step));
            if let Some((_, Step::Write(_, offset, data))) = rest.get(count) {
                let sectors = data.len().div_ceil(SECTOR) as u64;
                let end = (chance.below(sectors + 1) as usize * SECTOR).min(data.len());
                left.play(&Step::Write(file, *offset, data[..end].to_vec()));
            }
            left.sync(true);
            (left.disk, last_of(&rest[..count]).unwrap_or(changed))
        }
        Content::Any => {
            left.keep_some(chance);
            let (content, last) = any_part(left, rest, chance);
            (content, last.map_or(changed, |last| rest[last].0 + 1))
        }
    }
}

/// Length and time of any moment, as they stand in one inode, and each sector as it was after some of
/// the steps; the number of the last step that the inode knows of. What the inode knows to be cut off
/// is gone, and what was written after a cut that it does not know of has no place in it.
fn any_part(
    left: Halves,
    rest: &[(usize, &Step)],
    chance: &mut Chance,
) -> (Vec<u8>, Option<usize>) {
    let (steps, mut out, mut now) = (rest.len(), left.disk, left.cache);
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
    let mut until = HashMap::new();
    for (number, (_, step)) in (1..).zip(rest) {
        let before = now.len();
        apply(&mut now, step);
        for sector in touched(step, before, now.len()) {
            let state = until.entry(sector).or_insert_with(|| {
                let (from, upto) = states_of(sector);
                draw(chance, from, upto)
            });
            if number > *state {
                continue;
            }
            copy_sector(&now, &mut out, sector);
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
    /// What happens before the next call with a label.
    hook: Mutex<Option<(&'static str, Hook)>>,
}

type Hook = Box<dyn FnOnce() + Send>;

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
    calls: Vec<Called>,
    reads: Vec<Called>,
    /// How many calls there were, by label.
    made: HashMap<String, usize>,
    trouble: Option<Plan>,
    /// Threads whose next call fails.
    full: Vec<ThreadId>,
    /// Calls that fail because the script says so, by label.
    staged: Vec<&'static str>,
    hit: Option<Hit>,
}

impl Recorder {
    /// Watches `root` from now on.
    pub fn start(root: &Path, trouble: Option<Plan>) -> (Arc<Recorder>, Watching) {
        let base = Disk::load(root);
        let mut known = HashMap::new();
        for (name, file) in &base.names {
            known.insert(fs::metadata(root.join(name)).unwrap().ino(), *file);
        }
        let files = base.files.len();
        let state = State { files, known, trouble, ..State::default() };
        let recorder = Recorder {
            root: root.to_owned(),
            base,
            state: Mutex::new(state),
            hook: Mutex::default(),
        };
        let recorder = Arc::new(recorder);
        let watching = fault::watch(root, recorder.clone());
        (recorder, watching)
    }

    /// The calls so far that only read.
    pub fn reads(&self) -> Vec<Called> {
        self.state.lock().unwrap().reads.clone()
    }

    /// The calls so far that changed something.
    pub fn calls(&self) -> Vec<Called> {
        self.state.lock().unwrap().calls.clone()
    }

    /// How many steps were made before the call with this number; all that there are, if there is no
    /// such call.
    pub fn steps_before(&self, call: usize) -> usize {
        let state = self.state.lock().unwrap();
        state.calls.get(call).map_or(state.steps.len(), |called| called.begun)
    }

    /// The call that was hit.
    pub fn hit(&self) -> Option<Hit> {
        self.state.lock().unwrap().hit.clone()
    }

    /// Whether a call was hit in a way that somebody may notice.
    pub fn is_harmed(&self) -> bool {
        let state = self.state.lock().unwrap();
        let harmless = [Trouble::Short, Trouble::Errno(libc::EINTR)];
        let is_harmful = |plan: &Plan| !harmless.contains(&plan.trouble);
        state.hit.is_some() && state.trouble.as_ref().is_none_or(is_harmful)
    }

    /// No trouble any more.
    pub fn calm(&self) {
        self.state.lock().unwrap().trouble = None;
    }

    /// The next call with this label fails; that is no trouble, but what happens.
    pub fn stage(&self, label: &'static str) {
        self.state.lock().unwrap().staged.push(label);
    }

    /// Takes all of [`Recorder::stage`] back; whether one has still not come.
    pub fn unstage(&self) -> bool {
        !std::mem::take(&mut self.state.lock().unwrap().staged).is_empty()
    }

    /// Something else happens before the next call with this label.
    pub fn before_next(&self, label: &'static str, hook: impl FnOnce() + Send + 'static) {
        *self.hook.lock().unwrap() = Some((label, Box::new(hook)));
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
        if let Some(at) = self.staged.iter().position(|staged| *staged == label) {
            self.staged.swap_remove(at);
            return Verdict::Fail(libc::EIO);
        }
        let (kind, begun) = (kind_of(call), self.steps.len());
        let made = self.made.entry(label.to_owned()).or_default();
        let nth = *made;
        *made += 1;
        let called = Called { label: label.to_owned(), kind, nth, begun };
        match kind {
            READ => self.reads.push(called),
            _ => self.calls.push(called),
        }
        let verdict = self.trouble_of(label, nth, call);
        if verdict != Verdict::Go {
            let what = format!("{label}: {}", describe(call));
            let (label, calls) = (label.to_owned(), self.calls.len());
            let is_sync = matches!(call, Call::Sync(_) | Call::SyncFs(_));
            let hit = Hit { label, what, calls, step: begun, is_sync };
            self.hit.get_or_insert(hit);
        }
        verdict
    }

    fn trouble_of(&mut self, label: &str, nth: usize, call: &Call<'_>) -> Verdict {
        let thread = std::thread::current().id();
        let due = self.full.iter().position(|one| *one == thread);
        if let Some(at) = due.filter(|_| kind_of(call) != READ) {
            self.full.swap_remove(at);
            return Verdict::Fail(libc::ENOSPC);
        }
        let Some(plan) = &self.trouble else { return Verdict::Go };
        let is_due = plan.label == label && plan.nth == nth;
        let goes_on = plan.trouble == Trouble::Full && self.hit.is_some();
        if !(is_due || goes_on) || !plan.trouble.concerns(kind_of(call)) {
            return Verdict::Go;
        }
        let half = match call {
            Call::Write(_, _, data) => (data.len() / 2).max(1),
            Call::Read(_, _, len) => (len / 2).max(1),
            _ => 0,
        };
        match plan.trouble {
            Trouble::Errno(errno) => Verdict::Fail(errno),
            Trouble::Full => Verdict::Fail(libc::ENOSPC),
            Trouble::Short => Verdict::Short(half),
            Trouble::ShortAndFull => {
                self.full.push(thread);
                Verdict::Short(half)
            }
        }
    }

    /// The kernel takes for written what a sync could not write.
    fn note_failed_sync(&mut self, call: &Call<'_>) {
        let upto = self.steps.len();
        match call {
            Call::Sync(file) => {
                if let Some(number) = self.file(file) {
                    self.steps.push(Step::SyncFailed(Some(number), upto));
                }
            }
            Call::SyncFs(_) => self.steps.push(Step::SyncFailed(None, upto)),
            _ => {}
        }
    }

    fn file(&self, file: &File) -> Option<usize> {
        self.known.get(&file.metadata().unwrap().ino()).copied()
    }
}

fn kind_of(call: &Call<'_>) -> &'static str {
    match call {
        Call::Open(_) => "open",
        Call::Make(..) => "make",
        Call::Write(..) => "write",
        Call::Read(..) => READ,
        Call::Copy(..) => "copy",
        Call::Truncate(..) => "truncate",
        Call::Sync(_) => "sync",
        Call::SyncFs(_) => "syncfs",
        Call::SyncDir(_) => "sync dir",
        Call::Rename(..) => "rename",
        Call::Link(..) => "link",
        Call::Remove(_) => "remove",
        Call::MakeDirs(_) => "make dirs",
        Call::Mark(_) | Call::Flag(_) => "mark",
    }
}

fn describe(call: &Call<'_>) -> String {
    let path = call.path().unwrap_or_default();
    format!("{} {}", kind_of(call), path.file_name().unwrap_or_default().to_string_lossy())
}

impl Watch for Recorder {
    fn before(&self, label: &str, call: &Call<'_>) -> Verdict {
        let hook = self.hook.lock().unwrap().take_if(|(of, _)| *of == label);
        if let Some((_, hook)) = hook {
            hook();
        }
        let mut state = self.state.lock().unwrap();
        let (thread, steps) = (std::thread::current().id(), state.steps.len());
        state.begun.insert(thread, steps);
        if let Call::MakeDirs(path) = call {
            let missing = path.ancestors().take_while(|path| !path.exists());
            let missing = missing.map(|path| self.name(path)).collect();
            state.missing.insert(thread, missing);
        }
        let verdict = state.verdict(label, call);
        if matches!(verdict, Verdict::Fail(errno) if errno != libc::EINTR) {
            state.note_failed_sync(call);
        }
        verdict
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
            Call::Open(_) | Call::Mark(_) | Call::Flag(_) | Call::Read(..) => {}
        }
    }
}

/// What the next sync makes durable is only what was written after the one that failed.
#[test]
fn a_sync_that_failed_is_not_made_good_by_the_next() {
    let sectors = |byte: u8| vec![byte; 2 * SECTOR];
    let write = |offset: usize, data: Vec<u8>| Step::Write(0, offset as u64, data);
    let name = PathBuf::from("file");
    let steps = [
        Step::Make(0, Some(name)),
        Step::SyncDir(PathBuf::new(), 1),
        write(0, sectors(1)),
        Step::Sync(0, 3),
        write(0, sectors(2)),
        Step::SyncFailed(Some(0), 5),
        write(SECTOR, vec![3]),
        Step::Sync(0, 7),
    ];
    let left = |end, content| {
        let loss = Loss { content, names: Names::Lost };
        let disk = Disk::after_power_loss(&Disk::default(), &steps, end, loss, &mut Chance(1));
        disk.content("file").unwrap().to_vec()
    };
    let mut rewritten = sectors(1);
    rewritten[SECTOR..].fill(2);
    rewritten[SECTOR] = 3;
    assert_eq!(left(6, Content::Lost), sectors(1));
    assert_eq!(left(8, Content::Lost), rewritten);
    let mut whole = sectors(2);
    whole[SECTOR] = 3;
    assert_eq!(left(8, Content::Kept), whole);
}
