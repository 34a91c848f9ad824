//! Who uses a directory that cannot be unmounted: looked up in `/proc` when it is asked for.
//!
//! Only links are read and nothing is opened below the directory, so that nobody waits for the file
//! system there.

use std::fs;
use std::path::{Path, PathBuf};

/// How many are named.
const USERS_MAX: usize = 5;

/// The other processes that use something below `dir`, as a list for a message; empty if none is
/// found.
pub fn describe(dir: &Path) -> String {
    let dir = resolve(dir);
    let ours = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut users: Vec<_> = pids
        .filter(|pid| *pid != ours)
        .filter_map(|pid| use_of(Path::new("/proc").join(pid.to_string()).as_path(), &dir))
        .collect();
    let more = users.len().saturating_sub(USERS_MAX);
    users.truncate(USERS_MAX);
    if more > 0 {
        users.push(format!("{more} more"));
    }
    users.join(", ")
}

/// The path without links, as `/proc` shows it. The last part is the mount itself and is not touched.
fn resolve(dir: &Path) -> PathBuf {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let parent = absolute.parent().and_then(|parent| fs::canonicalize(parent).ok());
    match (parent, absolute.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => absolute,
    }
}

/// How the process with this directory in `/proc` uses `dir`, if it does.
fn use_of(process: &Path, dir: &Path) -> Option<String> {
    let is_in = |path: &PathBuf| path.starts_with(dir);
    let link = |name: &str| fs::read_link(process.join(name)).ok().filter(is_in);
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let mut open = descriptors.filter_map(|fd| fs::read_link(fd.path()).ok()).filter(is_in);
    let used = match (link("cwd").or_else(|| link("root")), open.next()) {
        (Some(_), _) => "works in it".to_owned(),
        (None, Some(path)) => format!("has {} open", shown(&path, dir)),
        (None, None) => format!("has {} mapped", shown(&mapped(process, dir)?, dir)),
    };
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    let pid = process.file_name()?.to_string_lossy().into_owned();
    Some(format!("{} (process {pid}) {used}", name.trim_end()))
}

fn mapped(process: &Path, dir: &Path) -> Option<PathBuf> {
    let maps = fs::read_to_string(process.join("maps")).ok()?;
    let mut paths = maps.lines().filter_map(|line| Some(PathBuf::from(&line[line.find('/')?..])));
    paths.find(|path| path.starts_with(dir))
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
