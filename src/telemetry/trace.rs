//! The trace file: every line of the log, debug lines too, in a file that is begun anew when it is
//! full.
//!
//! ```text
//! trace.log                                  the present file
//! trace-2026-11-23T07-11-00.890123.log.gz    full ones, with the time at which they were full
//! ```
//!
//! Invariants: a line stands in one file as a whole; at most `max_count` full files are kept, the
//! newest; a full one is there under one of its two names at each moment. What cannot be written is
//! lost and said on stderr, once.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::complain;
use super::log::timestamp_micros;
use crate::config::Tracing;
use crate::{os, threads};

const MEGABYTE: u64 = 1 << 20;
const GZIP: &str = ".gz";

/// The file that is written, and what becomes of it when it is full.
#[derive(Debug)]
pub struct RollingFile {
    keep: Keep,
    max_bytes: u64,
    file: File,
    len: u64,
    has_failed: bool,
    /// Compresses the last full one, and removes old ones.
    settling: Option<JoinHandle<()>>,
}

/// What is kept of full files.
#[derive(Debug, Clone)]
struct Keep {
    /// The present file.
    path: PathBuf,
    /// Zero: all.
    max_count: usize,
    compress: bool,
}

impl RollingFile {
    /// Opens the file of the configuration, and makes it if it is missing; it goes on where it ended.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(config: &Tracing) -> io::Result<RollingFile> {
        if let Some(dir) = config.path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            os::create_dirs("trace:dir", dir)?;
        }
        let file = os::open_or_create("trace:file", &config.path)?;
        let keep = Keep {
            path: config.path.clone(),
            max_count: config.max_count as usize,
            compress: config.compress,
        };
        Ok(RollingFile {
            keep,
            max_bytes: u64::from(config.max_size_mb.max(1)) * MEGABYTE,
            len: file.metadata()?.len(),
            file,
            has_failed: false,
            settling: None,
        })
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.len > 0 && self.len + line.len() as u64 > self.max_bytes {
            self.roll()?;
        }
        os::write_at("trace:file", &self.file, line, self.len)?;
        self.len += line.len() as u64;
        Ok(())
    }

    fn roll(&mut self) -> io::Result<()> {
        self.settle();
        let full = self.keep.full_path(SystemTime::now());
        let renamed = os::rename("trace:full", &self.keep.path, &full);
        // Somebody has moved or removed it, or a new one could not be made the last time.
        let is_missing =
            renamed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        if !is_missing {
            renamed?;
        }
        self.file = os::create_new("trace:file", &self.keep.path)?;
        self.len = 0;
        if is_missing {
            return Ok(());
        }
        let keep = self.keep.clone();
        let settling = threads::spawn("litefs-trace", move || {
            if let Err(error) = keep.settle(&full) {
                complain(format_args!("ERROR: keep trace file {}: {error}", full.display()));
            }
        });
        self.settling = Some(settling?);
        Ok(())
    }

    /// Waits until the last full file is what it is to be.
    fn settle(&mut self) {
        if let Some(thread) = self.settling.take() {
            // It says itself what went wrong.
            let _ = thread.join();
        }
    }
}

impl Write for RollingFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.append(line)
            && !std::mem::replace(&mut self.has_failed, true)
        {
            let path = self.keep.path.display();
            complain(format_args!("ERROR: write trace file {path}: {error}"));
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The trace file as the threads of the process share it. One that panics over it must not take the log, and
/// so their lives, from the others: the file is written on.
#[derive(Debug)]
pub struct SharedFile(Mutex<RollingFile>);

impl SharedFile {
    /// Lets threads share it.
    pub fn new(file: RollingFile) -> SharedFile {
        SharedFile(Mutex::new(file))
    }

    fn lock(&self) -> MutexGuard<'_, RollingFile> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for &SharedFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.lock().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lock().flush()
    }
}

impl Keep {
    /// Name and extension of the present file.
    fn parts(&self) -> (String, String) {
        let text = |part: Option<&std::ffi::OsStr>| {
            part.map(|part| part.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let extension = text(self.path.extension());
        let extension = if extension.is_empty() { extension } else { format!(".{extension}") };
        (text(self.path.file_stem()), extension)
    }

    fn full_path(&self, time: SystemTime) -> PathBuf {
        let (stem, extension) = self.parts();
        let time = timestamp_micros(time).replace(':', "-");
        self.path.with_file_name(format!("{stem}-{time}{extension}"))
    }

    /// Compresses a full file, if that is wanted, and removes the oldest ones.
    fn settle(&self, full: &Path) -> io::Result<()> {
        if self.compress {
            compress(full)?;
        }
        let mut old = self.full_files()?;
        let surplus = old.len().saturating_sub(self.max_count);
        if self.max_count > 0 {
            old.drain(..surplus).try_for_each(|path| os::remove_if_present("trace:old", &path))?;
        }
        Ok(())
    }

    /// The full files, the oldest first: their names are their times.
    fn full_files(&self) -> io::Result<Vec<PathBuf>> {
        let (stem, extension) = self.parts();
        let prefix = format!("{stem}-");
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let mut files = Vec::new();
        for entry in fs::read_dir(dir.unwrap_or(Path::new(".")))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let time = name.strip_prefix(&prefix).and_then(|rest| {
                rest.strip_suffix(GZIP).unwrap_or(rest).strip_suffix(extension.as_str())
            });
            // Nothing but our own: a year, and a dash after it.
            if time.is_some_and(|time| time.len() == TIME_LEN && time.as_bytes()[4] == b'-') {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }
}

/// Length of a time in a name: `2026-11-23T07-11-00.890123`.
const TIME_LEN: usize = 26;

fn compress(full: &Path) -> io::Result<()> {
    let name = |end: &str| {
        let mut name = full.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    let (partial, whole) = (name(".gz.tmp"), name(GZIP));
    os::remove_if_present("trace:gzip", &partial)?;
    let mut encoder =
        GzEncoder::new(os::create_new("trace:gzip", &partial)?, Compression::default());
    io::copy(&mut File::open(full)?, &mut encoder)?;
    encoder.finish()?;
    os::rename("trace:gzip", &partial, &whole)?;
    os::remove("trace:full", full)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    /// A trace file of a few bytes in `dir`.
    fn open(dir: &Path, max_count: u32, compress: bool) -> RollingFile {
        let path = dir.join("sub/trace.log");
        let config = Tracing { path, max_count, compress, ..Tracing::default() };
        let mut file = RollingFile::open(&config).unwrap();
        file.max_bytes = 20;
        file
    }

    fn line(file: &mut RollingFile, number: u32) {
        // A line at a time, as log lines come.
        file.write_all(format!("line {number}\n").as_bytes()).unwrap();
        file.settle();
    }

    fn text(path: &Path) -> String {
        let mut text = String::new();
        let mut file = File::open(path).unwrap();
        match path.extension().is_some_and(|extension| extension == "gz") {
            true => GzDecoder::new(file).read_to_string(&mut text),
            false => file.read_to_string(&mut text),
        }
        .unwrap();
        text
    }

    #[test]
    fn a_full_file_is_kept_and_the_oldest_goes() {
        for compress in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let mut file = open(dir.path(), 2, compress);
            for number in 1..=8 {
                line(&mut file, number);
            }
            let kept: Vec<_> = file.keep.full_files().unwrap().iter().map(|p| text(p)).collect();
            assert_eq!(kept, ["line 3\nline 4\n", "line 5\nline 6\n"]);
            assert_eq!(text(&file.keep.path), "line 7\nline 8\n");
            let count = fs::read_dir(dir.path().join("sub")).unwrap().count();
            assert_eq!(count, 3, "nothing else is left");
            let names = file.keep.full_files().unwrap();
            assert!(names.iter().all(|name| name.to_str().unwrap().ends_with(".gz") == compress));
        }
    }

    #[test]
    fn a_thread_that_panics_takes_the_file_from_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let file = SharedFile::new(open(dir.path(), 1, true));
        let panicked = std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _guard = file.lock();
                panic!("on purpose");
            });
            holder.join().is_err()
        });
        assert!(panicked);
        (&file).write_all(b"line 1\n").unwrap();
        assert_eq!(text(&file.lock().keep.path), "line 1\n");
    }

    #[test]
    fn a_file_that_somebody_removed_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = open(dir.path(), 2, true);
        line(&mut file, 1);
        os::remove_if_present("test", &file.keep.path).unwrap();
        for number in 2..=4 {
            line(&mut file, number);
        }
        assert_eq!(text(&file.keep.path), "line 3\nline 4\n");
        assert_eq!(file.keep.full_files().unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_file_goes_on_after_a_restart_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        line(&mut open(dir.path(), 1, true), 1);
        let foreign = dir.path().join("sub/trace-notes.log");
        os::create_new("test", &foreign).unwrap();
        let mut file = open(dir.path(), 1, true);
        for number in 2..=6 {
            line(&mut file, number);
        }
        assert_eq!(text(&file.keep.path), "line 5\nline 6\n");
        assert!(foreign.exists());
    }
}
