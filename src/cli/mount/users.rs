//! Who uses a directory that cannot be unmounted: looked up in `/proc` when it is asked for.
//!
//! Links are read and nothing is opened below the directory, so that nobody waits for the file system
//! there. Only where no link tells are the mappings of processes read: the kernel lets nobody see those
//! of a process that waits for a page, on this mount or any other, so that has a limit.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How many are named.
const USERS_MAX: usize = 5;

/// How long the mappings of processes are waited for.
const MAPPED_MAX: Duration = Duration::from_secs(2);

/// The other processes that use something below `dir`, as a list for a message; empty if none is
/// found.
pub fn describe(dir: &Path) -> String {
    let dir = resolve(dir);
    let mut users = users(&dir, linked);
    if users.is_empty() {
        let (sender, found) = mpsc::channel();
        // Given up with this process, if it waits for longer; without a thread nobody is found.
        let look = move || _ = sender.send(self::users(&dir, mapped));
        let _ = thread::Builder::new().name("litefs-users".into()).spawn(look);
        users = found.recv_timeout(MAPPED_MAX).unwrap_or_default();
    }
    let more = users.len().saturating_sub(USERS_MAX);
    users.truncate(USERS_MAX);
    if more > 0 {
        users.push(format!("{more} more"));
    }
    users.join(", ")
}

/// Each process but this one of which `use_of` says, by its directory in `/proc`, how it uses `dir`.
fn users(dir: &Path, use_of: fn(&Path, &Path) -> Option<String>) -> Vec<String> {
    let ours = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let others = pids.filter(|pid| *pid != ours);
    let described = others.filter_map(|pid| {
        let process = Path::new("/proc").join(pid.to_string());
        let used = use_of(&process, dir)?;
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        Some(format!("{} (process {pid}) {used}", name.trim_end()))
    });
    described.collect()
}

/// The path without links, as `/proc` shows it. The last part is the mount itself and is not touched.
pub fn resolve(dir: &Path) -> PathBuf {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let parent = absolute.parent().and_then(|parent| fs::canonicalize(parent).ok());
    match (parent, absolute.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => absolute,
    }
}

/// What the links of a process tell.
fn linked(process: &Path, dir: &Path) -> Option<String> {
    let is_in = |path: &PathBuf| path.starts_with(dir);
    let link = |name: &str| fs::read_link(process.join(name)).ok().filter(is_in);
    if link("cwd").or_else(|| link("root")).is_some() {
        return Some("works in it".to_owned());
    }
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let mut open = descriptors.filter_map(|fd| fs::read_link(fd.path()).ok()).filter(is_in);
    open.next().map(|path| format!("has {} open", shown(&path, dir)))
}

/// What the mappings of a process tell.
fn mapped(process: &Path, dir: &Path) -> Option<String> {
    let maps = fs::read_to_string(process.join("maps")).ok()?;
    let mut paths = maps.lines().filter_map(|line| Some(PathBuf::from(&line[line.find('/')?..])));
    let path = paths.find(|path| path.starts_with(dir))?;
    Some(format!("has {} mapped", shown(&path, dir)))
}

fn shown(path: &Path, dir: &Path) -> String {
    let below = path.strip_prefix(dir).unwrap_or(path);
    if below.as_os_str().is_empty() { "it".to_owned() } else { below.display().to_string() }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Command, Stdio};

    use super::*;
    use crate::os;

    /// What is said of a process that runs `script` in a directory with the file `app.db`.
    fn check(script: &str, expected: &str) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("mnt");
        os::create_dirs("test", &dir).unwrap();
        os::create_new("test", &dir.join("app.db")).unwrap();
        assert_eq!(describe(&dir), "");
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{script}; echo ready; read x")]).current_dir(root.path());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let found = describe(&dir);
        let expected = format!("sh (process {}) {expected}", child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, expected);
    }

    #[test]
    fn who_uses_a_directory_is_named() {
        check("exec 3<mnt/app.db", "has app.db open");
        check("cd mnt", "works in it");
    }
}
