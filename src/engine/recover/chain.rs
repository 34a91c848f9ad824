//! The LTX files as start-up finds them, and whether they can be believed.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ltx::{Checksum, Decoder, HEADER_SIZE, Header, Pgno, Pos, TRAILER_SIZE, Trailer, Txid};

use super::image::Image;
use super::{Error, io_error};
use crate::os;

/// How much of a file is read at once, in bytes.
const READ_SIZE: usize = 256 << 10;

/// Files that were written this long before the newest one have reached the disk, even if nobody
/// asked for it: the kernel writes back what is older than half a minute.
const WRITTEN_BACK: Duration = Duration::from_secs(120);

/// A file, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LtxFile {
    pub(super) min: Txid,
    pub(super) max: Txid,
    pub(super) path: PathBuf,
}

/// A file whose header and trailer were read.
#[derive(Debug, Clone)]
pub(super) struct End {
    pub(super) file: LtxFile,
    pub(super) header: Header,
    pub(super) trailer: Trailer,
}

impl End {
    /// The position after the file.
    pub(super) fn pos(&self) -> Pos {
        Pos { txid: self.header.max_txid, checksum: self.trailer.post_apply }
    }
}

/// The pages of a file.
type Pages = Vec<(Pgno, Checksum)>;

/// The files of one database, oldest first.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<LtxFile>);

impl Files {
    /// The files in `dir`; none if the directory is missing.
    pub(super) fn list(dir: &Path) -> Result<Files, Error> {
        let mut files = Vec::new();
        for name in names(dir)? {
            if let Some((min, max)) = ltx::parse_file_name(&name) {
                files.push(LtxFile { min, max, path: dir.join(name) });
            }
        }
        files.sort_by_key(|file| (file.max, file.min));
        Ok(Files(files))
    }

    /// From the newest to the oldest.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = &LtxFile> {
        self.0.iter().rev()
    }

    /// The file that ends right before transaction `min`.
    pub(super) fn before(&self, min: Txid) -> Option<&LtxFile> {
        let end = self.0.partition_point(|file| file.max < min);
        self.0[..end].last().filter(|file| file.max == min.previous() && !file.max.is_zero())
    }

    /// The files that end after transaction `txid`.
    pub(super) fn after(&self, txid: Txid) -> impl Iterator<Item = &LtxFile> {
        self.0.iter().filter(move |file| file.max > txid)
    }

    /// The first transaction of the run of files that lead to each other up to `end`.
    pub(super) fn run_start(&self, end: &End) -> Result<Txid, Error> {
        let mut next = end.clone();
        while let Some(file) = self.before(next.header.min_txid) {
            match peek(file)? {
                Some(previous) if leads_to(&previous, &next) => next = previous,
                _ => break,
            }
        }
        Ok(next.header.min_txid)
    }

    /// Those of the recent files before `end` that are damaged, or that stand where they should lead to
    /// the next one and do not: the chain begins after the last of them.
    pub(super) fn broken(&self, end: &End) -> Result<Vec<&LtxFile>, Error> {
        let mut broken = Vec::new();
        // None behind a gap: what stands there leads nowhere, and is only to be whole.
        let mut next = Some(end.clone());
        for file in self.newest_first().filter(|file| file.max < end.header.min_txid) {
            if !is_recent(file, end)? {
                break;
            }
            let follows = next.as_ref().is_some_and(|next| file.max.next() == next.header.min_txid);
            let this = load(file)?.map(|(this, _)| this);
            let leads = |this: &End| next.as_ref().is_some_and(|next| leads_to(this, next));
            if this.is_none() || (follows && !this.as_ref().is_some_and(leads)) {
                broken.push(file);
                next = next.filter(|_| !follows);
            } else if follows {
                next = this;
            }
        }
        Ok(broken)
    }

    /// Those of the files up to `end` that are of another history: transactions of files that lead to `end`,
    /// in another state. A snapshot of another node, and what it takes the place of, stand beside each other
    /// if the node dies meanwhile.
    pub(super) fn strangers(&self, end: &End) -> Result<Vec<&LtxFile>, Error> {
        // Their names tell already whether there can be any.
        if self.0.windows(2).all(|pair| pair[0].max < pair[1].min) {
            return Ok(Vec::new());
        }
        let (mut strangers, mut beside) = (Vec::new(), Vec::new());
        let mut next = end.clone();
        let older = |file: &&LtxFile| file.max <= end.header.max_txid && **file != end.file;
        for file in self.newest_first().filter(older) {
            let this = peek(file)?;
            if file.max >= next.header.min_txid {
                // Where it leads to the same state, there is one history.
                if this.is_none_or(|this| this.pos() != next.pos()) {
                    strangers.push(file);
                }
            } else if file.max.next() < next.header.min_txid {
                break;
            } else if let Some(this) = this.filter(|this| leads_to(this, &next)) {
                next = this;
                strangers.append(&mut beside);
            } else {
                beside.push(file);
            }
        }
        Ok(strangers)
    }

    /// Lays the pages of ever more files, from `end` back, over each of `bases`, until one has the
    /// checksum that `end` promises, and on through the recent files: equal checksums are no proof of
    /// equal pages ([`super`]). `unexplained` are pages of the WAL; those that are in a file are taken
    /// out, and files are read on until none is left.
    pub(super) fn search(
        &self,
        end: &End,
        mut bases: Vec<Image>,
        unexplained: &mut HashSet<(Pgno, Checksum)>,
    ) -> Result<Option<Suffix>, Error> {
        for base in &mut bases {
            base.resize(end.header.commit)?;
        }
        let wanted = end.trailer.post_apply;
        // So many files, from the newest, change something in each base.
        let mut needed = vec![0; bases.len()];
        let (mut newest, mut files) = (Newest::of(end), Vec::new());
        let mut next: Option<End> = None;
        let mut file = &end.file;
        while let Some((this, pages)) = load(file)? {
            let links = next.as_ref().is_none_or(|next| leads_to(&this, next));
            if !links || this.header.page_size != end.header.page_size {
                break;
            }
            pages.iter().for_each(|page| _ = unexplained.remove(page));
            files.push(file.clone());
            for (pgno, sum) in newest.take(&this, pages) {
                for (base, needed) in bases.iter_mut().zip(&mut needed) {
                    if base.get(pgno) != sum {
                        base.set(pgno, sum)?;
                        *needed = files.len();
                    }
                }
            }
            let fits = bases.iter().any(|base| base.rolling() == wanted);
            let enough = fits && unexplained.is_empty() && !is_recent(file, end)?;
            let Some(previous) = self.before(file.min).filter(|_| !enough) else {
                break;
            };
            next = Some(this);
            file = previous;
        }
        let fits = |base: &Image| base.rolling() == wanted;
        let Some(base) = bases.iter().position(fits) else { return Ok(None) };
        let bare_fits = bases.last().is_some_and(fits);
        let whole = bases[base].page_numbers().all(|pgno| newest.seen.contains(&pgno));
        let fitting = bases.iter().zip(&needed).filter(|(base, _)| fits(base));
        let needed = fitting.map(|(_, needed)| *needed).max().unwrap_or(0);
        let unneeded = files.len() - needed;
        files.reverse();
        Ok(Some(Suffix { base, bare_fits, image: bases.swap_remove(base), whole, files, unneeded }))
    }

    /// Whether the files that lead to `end` say of no page of `image` but those of `except` that it was
    /// another one there.
    pub(super) fn agree(
        &self,
        end: &End,
        image: &Image,
        except: &HashSet<Pgno>,
        reach: Reach,
    ) -> Result<bool, Error> {
        let mut newest = Newest::of(end);
        let mut next: Option<End> = None;
        let mut file = Some(&end.file);
        while let Some((this, pages)) = file.map(load).transpose()?.flatten() {
            if next.as_ref().is_some_and(|next| !leads_to(&this, next)) {
                break;
            }
            let differs = |(pgno, sum)| !except.contains(&pgno) && image.get(pgno) != sum;
            if newest.take(&this, pages).any(differs) {
                return Ok(false);
            }
            file = self.before(this.header.min_txid);
            if let (Reach::Recent, Some(older)) = (reach, file)
                && !is_recent(older, end)?
            {
                break;
            }
            next = Some(this);
        }
        Ok(true)
    }
}

/// How far back files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// As far as they lead to each other.
    All,
    /// Those whose pages may not have reached the disk.
    Recent,
}

/// The newest image of each page, of files that are read from the newest to the oldest.
struct Newest {
    seen: HashSet<Pgno>,
    /// The database was never larger since, in pages: what stood behind has gone.
    pages: u32,
}

impl Newest {
    fn of(end: &End) -> Newest {
        Newest { seen: HashSet::new(), pages: end.header.commit }
    }

    /// The pages of a file that no file after it has, or cuts off.
    fn take(&mut self, file: &End, pages: Pages) -> impl Iterator<Item = (Pgno, Checksum)> {
        self.pages = self.pages.min(file.header.commit);
        pages.into_iter().filter(|(pgno, _)| pgno.0 <= self.pages && self.seen.insert(*pgno))
    }
}

/// Files that bring a database to the end of the chain.
#[derive(Debug)]
pub(super) struct Suffix {
    /// On which of the bases.
    pub(super) base: usize,
    /// Whether the last of the bases gives the same result.
    pub(super) bare_fits: bool,
    /// The result.
    pub(super) image: Image,
    /// Whether they hold every page, so that nothing of the base is left.
    pub(super) whole: bool,
    /// Oldest first.
    pub(super) files: Vec<LtxFile>,
    /// So many of them, the oldest, change nothing.
    pub(super) unneeded: usize,
}

fn leads_to(previous: &End, next: &End) -> bool {
    previous.pos() == next.header.pre_pos()
}

/// The names in a directory; none if it is missing.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("list directory", dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_error("list directory", dir))?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}

/// Whether a file may not have reached the disk when `end` was written.
fn is_recent(file: &LtxFile, end: &End) -> Result<bool, Error> {
    Ok(modified(file)? + WRITTEN_BACK >= modified(&end.file)?)
}

fn modified(file: &LtxFile) -> Result<SystemTime, Error> {
    let modified = fs::metadata(&file.path).and_then(|meta| meta.modified());
    modified.map_err(io_error("stat ltx file", &file.path))
}

/// The ends of a file; `None` if they cannot be those of a file of this name.
pub(super) fn peek(file: &LtxFile) -> Result<Option<End>, Error> {
    let error = || io_error("read ltx file", &file.path);
    let source = File::open(&file.path).map_err(error())?;
    let len = source.metadata().map_err(error())?.len();
    let (mut header, mut trailer) = ([0; HEADER_SIZE], [0; TRAILER_SIZE]);
    let Some(trailer_at) = len.checked_sub(TRAILER_SIZE as u64).filter(|at| *at > 100) else {
        return Ok(None);
    };
    os::read_exact_at("read:ltx", &source, &mut header, 0).map_err(error())?;
    os::read_exact_at("read:ltx", &source, &mut trailer, trailer_at).map_err(error())?;
    let Ok(header) = Header::decode(&header) else {
        return Ok(None);
    };
    let trailer = Trailer::decode(&trailer, header.commit).ok();
    Ok(trailer.and_then(|trailer| named(file, header, trailer)))
}

/// A whole file, verified, with the checksums of its pages; `None` if it is not valid.
pub(super) fn load(file: &LtxFile) -> Result<Option<(End, Pages)>, Error> {
    let error = || io_error("read ltx file", &file.path);
    let source = File::open(&file.path).map_err(error())?;
    match decode(BufReader::with_capacity(READ_SIZE, os::FileCursor::new("read:ltx", source))) {
        Err(ltx::Error::Read(source)) => Err(error()(source)),
        Err(_) => Ok(None),
        Ok((header, trailer, pages)) => Ok(named(file, header, trailer).map(|end| (end, pages))),
    }
}

fn decode(source: impl Read) -> Result<(Header, Trailer, Pages), ltx::Error> {
    let mut decoder = Decoder::new(source)?;
    let header = *decoder.header();
    let mut page = vec![0; header.page_size.bytes()];
    let mut pages = Vec::new();
    while let Some(pgno) = decoder.next_page(&mut page)? {
        pages.push((pgno, decoder.page_checksum()));
    }
    Ok((header, decoder.finish()?, pages))
}

/// The file with what it holds, if that is what its name says.
fn named(file: &LtxFile, header: Header, trailer: Trailer) -> Option<End> {
    let same = (header.min_txid, header.max_txid) == (file.min, file.max);
    same.then(|| End { file: file.clone(), header, trailer })
}
