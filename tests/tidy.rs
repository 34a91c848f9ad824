//! The rules of the source tree that neither the compiler nor clippy checks.
//!
//! Comments do not count, except for the one rule about them. A rule that is broken names each
//! place as `FILE:LINE`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where our Rust files are.
const ROOTS: &[&str] =
    &["src", "fuse/src", "ltx/src", "tests", "fuse/tests", "ltx/tests", "benches"];

struct Source {
    /// From the root of the workspace.
    path: String,
    text: String,
}

impl Source {
    /// Lines of code with their number, counted from 1.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// The line from which on all code belongs to tests.
    fn tests_begin(&self) -> usize {
        let begin = self.text.lines().position(|line| line == "#[cfg(test)]");
        if self.is_test() { 0 } else { begin.unwrap_or(usize::MAX) }
    }

    fn is_test(&self) -> bool {
        self.path.contains("tests/") || self.path.ends_with("/tests.rs")
    }

    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    for dir in ROOTS {
        collect(&root.join(dir), &mut paths);
    }
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let path = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        Source { path, text }
    };
    let sources: Vec<_> = paths.into_iter().map(read).collect();
    assert!(sources.len() > 20, "only {} files found", sources.len());
    sources
}

fn collect(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, out);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            out.push(path);
        }
    }
}

/// Places in the code of the program itself.
fn program(places: &(&Source, (usize, &str))) -> bool {
    places.1.0 < places.0.tests_begin()
}

/// Whether `word` stands in `line` as a word of its own.
fn has_word(line: &str, word: &str) -> bool {
    let boundary = |c: Option<char>| c.is_none_or(|c| c != '_' && !c.is_alphanumeric());
    line.match_indices(word).any(|(at, _)| {
        boundary(line[..at].chars().next_back()) && boundary(line[at + word.len()..].chars().next())
    })
}

/// Fails with every place where `broken` holds.
#[track_caller]
fn refuse<'a>(rule: &str, places: impl Iterator<Item = (&'a Source, (usize, &'a str))>) {
    let found: Vec<_> = places
        .map(|(source, (number, line))| format!("{}:{number}: {}", source.path, line.trim()))
        .collect();
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

fn code(
    sources: &[Source],
    wanted: impl Fn(&Source) -> bool,
) -> impl Iterator<Item = (&Source, (usize, &str))> {
    let wanted = sources.iter().filter(move |source| wanted(source));
    wanted.flat_map(|source| source.code().map(move |line| (source, line)))
}

#[test]
fn every_file_says_first_what_it_owns() {
    let sources = sources();
    let broken = sources.iter().filter(|source| !source.text.starts_with("//! "));
    refuse("a file starts with //!", broken.map(|source| (source, (1, ""))));
}

#[test]
fn only_the_volume_and_mount_know_fuse() {
    let sources = sources();
    let outside = |source: &Source| {
        source.is_in(&["src/"]) && !source.is_in(&["src/volume.rs", "src/volume/", "src/cli/mount"])
    };
    let names = |line: &str| line.contains("fuse::") || has_word(line, "use fuse;");
    refuse("only volume and cli/mount name fuse", code(&sources, outside).filter(|l| names(l.1.1)));
}

#[test]
fn only_the_network_side_knows_tokio() {
    let sources = sources();
    let places = ["src/http", "src/cluster", "src/cli", "src/main.rs", "src/supervisor"];
    let outside = |source: &Source| {
        let ours = source.is_in(&["src/", "ltx/src/", "fuse/src/"]);
        ours && !source.is_in(&places)
    };
    let broken = code(&sources, outside).filter(program).filter(|l| has_word(l.1.1, "tokio"));
    refuse("only http, cluster, cli and supervisor name tokio", broken);
}

#[test]
fn the_engine_is_synchronous() {
    let sources = sources();
    let inside = |source: &Source| source.is_in(&["src/engine", "src/sqlite", "ltx/src/"]);
    let broken = code(&sources, inside).filter(|l| has_word(l.1.1, "async"));
    refuse("no async in engine, sqlite and ltx", broken);
}

#[test]
fn the_engine_is_told_time_and_chance() {
    let sources = sources();
    let inside = |source: &Source| source.is_in(&["src/sqlite", "ltx/src/"]);
    let clocks = ["SystemTime::now", "Instant::now", "getrandom"];
    let broken = code(&sources, inside)
        .filter(program)
        .filter(|l| clocks.iter().any(|clock| l.1.1.contains(clock)));
    refuse("formats are told time and chance", broken);
}

#[test]
fn tests_wait_for_conditions() {
    let sources = sources();
    // In two parts, so that this file does not break its own rule.
    let words = [concat!("sle", "ep("), concat!("#[ign", "ore")];
    let tests = code(&sources, |_| true).filter(|place| !program(place));
    let broken = tests.filter(|l| words.iter().any(|word| l.1.1.contains(word)));
    refuse("a test waits for a condition, and runs", broken);
}

#[test]
fn nothing_is_left_to_do() {
    let sources = sources();
    let words = [concat!("to", "do!("), concat!("unimple", "mented!("), concat!("db", "g!(")];
    let broken = code(&sources, |_| true).filter(|l| words.iter().any(|word| l.1.1.contains(word)));
    refuse("no placeholders", broken);
}

#[test]
fn a_closed_stream_makes_nothing_panic() {
    let sources = sources();
    let outside = |source: &Source| source.is_in(&["src/", "fuse/src/", "ltx/src/"]);
    // The names of those for stderr end in these too.
    let words = ["println!(", "print!("];
    let broken = code(&sources, outside)
        .filter(program)
        .filter(|l| words.iter().any(|word| l.1.1.contains(word)));
    refuse("lines for people are written by telemetry::say and complain", broken);
}

#[test]
fn anyhow_stays_at_the_command_line() {
    let sources = sources();
    let outside =
        |source: &Source| !source.is_in(&["src/main.rs", "src/cli", "tests/", "benches/"]);
    let broken = code(&sources, outside).filter(|l| has_word(l.1.1, "anyhow"));
    refuse("only main and cli name anyhow", broken);
}

#[test]
fn only_os_changes_files() {
    let sources = sources();
    let outside = |source: &Source| source.is_in(&["src/"]) && !source.is_in(&["src/os.rs"]);
    // The functions of std::fs are in clippy.toml.
    let calls = ["File::create", "OpenOptions", ".set_len(", ".write_all_at("];
    let broken = code(&sources, outside)
        .filter(program)
        .filter(|l| calls.iter().any(|call| l.1.1.contains(call)));
    refuse("a call that changes a file has a label, in src/os.rs", broken);
}

/// The keys of `src/config.rs`, as the paths that a person writes.
#[test]
fn the_configuration_page_has_every_key() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = fs::read_to_string(root.join("src/config.rs")).unwrap();
    let page = fs::read_to_string(root.join("docs/configuration.md")).unwrap();
    let keys =
        source.lines().filter_map(|line| line.trim().strip_prefix('"')?.split_once("\" => "));
    let keys = keys.filter(|(_, rest)| rest.contains(": ") && rest.contains(" = "));
    let sections =
        ["data", "fuse", "http", "proxy", "lease", "consul", "backup", "log", "tls", "tracing"];
    let (mut count, mut missing) = (0, Vec::new());
    for (key, _) in keys.filter(|(key, _)| !sections.contains(key)) {
        count += 1;
        let stands = page.contains(&format!("| `{key}` |")) || page.contains(&format!(".{key}` |"));
        if !stands {
            missing.push(key);
        }
    }
    assert!(count > 50, "only {count} keys found");
    assert!(missing.is_empty(), "not in docs/configuration.md: {missing:?}");
}

/// Texts of the program's code that begin with one of `starts` and go on with letters of a name.
fn named(sources: &[Source], starts: &[&str]) -> BTreeSet<String> {
    let ours = |source: &Source| source.is_in(&["src/"]) && !source.is_test();
    let lines = code(sources, ours).filter(program).map(|(_, (_, line))| line);
    let texts = lines.flat_map(|line| line.split('"').skip(1).step_by(2));
    let texts = texts.filter(|text| starts.iter().any(|start| text.starts_with(start)));
    let is_name = |text: &&str| {
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_/.".contains(&byte);
        text.len() > 1 && text.bytes().all(is_letter)
    };
    texts.filter(is_name).map(str::to_owned).collect()
}

/// Metrics, variables of the environment and paths of the API, as the code has them.
#[test]
fn the_reference_has_what_the_program_names() {
    let page = include_str!("../docs/reference.md");
    let sources = sources();
    let metrics = named(&sources, &["litefs_"]);
    let variables = named(&sources, &["CONSUL_", "LITEFS_CLOUD_", "FLY_", "HOSTNAME"]);
    let server = sources.into_iter().filter(|source| source.path == "src/http/server.rs");
    let paths = named(&server.collect::<Vec<_>>(), &["/"]);
    let counts = [metrics.len(), variables.len(), paths.len()];
    assert!(counts[0] > 30 && counts[1] > 10 && counts[2] > 12, "only {counts:?} found");
    let is_word = |c: char| c.is_ascii_alphanumeric() || "_/.".contains(c);
    let words: BTreeSet<&str> = page.split(|c| !is_word(c)).collect();
    let all = metrics.iter().chain(&variables).chain(&paths);
    let missing: Vec<_> = all.filter(|name| !words.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "not in docs/reference.md: {missing:?}");
    let told = words.into_iter().filter(|word| word.starts_with("litefs_"));
    let gone: Vec<_> = told.filter(|word| !metrics.contains(*word)).collect();
    assert!(gone.is_empty(), "docs/reference.md names what is gone: {gone:?}");
}

#[test]
fn only_the_kernels_side_is_unsafe() {
    let sources = sources();
    let outside = |source: &Source| source.is_in(&["src/", "ltx/src/"]);
    let broken = code(&sources, outside).filter(program).filter(|l| has_word(l.1.1, "unsafe"));
    refuse("unsafe stands in fuse/src", broken);
}
