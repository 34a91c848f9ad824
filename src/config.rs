//! The configuration file `litefs.yml`, read once into plain data.
//!
//! Format: YAML 1.2, first document only, with Go's duration syntax ([`duration`]) and shell words
//! in `exec` ([`exec`]). Variables are replaced in the text before it is parsed ([`expand`]).
//!
//! Invariants: an unknown key, at any depth, is an error with file, line and key. A key without a
//! value keeps its default. A [`Config`] that [`load`] returns has passed every check that needs no
//! network and no file system.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, de};

use crate::engine::layout::DataDir;
use crate::http::url::Url;
use crate::tls::Identity;

mod duration;
mod environment;
mod exec;
mod expand;
#[cfg(any(test, fuzzing))]
pub(crate) mod properties;

pub use environment::{Environment, machine_name};
pub use exec::{Command, WordsError, split_words};

/// The file name that is searched for.
const FILE_NAME: &str = "litefs.yml";
/// The last place that is searched.
const SYSTEM_FILE: &str = "/etc/litefs.yml";

/// Whether variables in the text of the file are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expansion {
    /// `$NAME`, `${NAME}` and the other forms are replaced.
    On,
    /// The file is taken literally.
    Off,
}

/// A checked configuration and where it comes from.
#[derive(Debug)]
pub struct Loaded {
    /// What the file says.
    pub config: Config,
    /// The absolute path of the file.
    pub path: PathBuf,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None of the searched files exists.
    #[error("config file not found")]
    NotFound,
    /// The file is there but cannot be read.
    #[error("cannot read config file at {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// The file holds nothing but blanks and comments.
    #[error("config file is empty: {}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file is no YAML, or has an unknown key or a value that does not fit.
    #[error("{}:{line}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong there, with the key.
        message: String,
    },
    /// The values contradict each other or one that is required is missing.
    #[error("{}:{line}: {}", path.display(), invalid.with_key())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The line of the key, or of what it belongs into, counted from 1.
        line: u64,
        /// What is wrong.
        invalid: Invalid,
    },
}

/// A configuration that cannot work.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Invalid {
    #[error("fuse directory required")]
    FuseDir,
    #[error("data directory required")]
    DataDir,
    #[error("fuse directory and data directory cannot be the same path")]
    SameDir,
    #[error("invalid lease type, must be either 'consul' or 'static', got: '{0}'")]
    LeaseType(String),
    #[error("cannot specify a database replication filter on candidate nodes")]
    FilterOnCandidate,
    #[error("consul lease key required")]
    ConsulKey,
    #[error("invalid log format: {0:?}")]
    LogFormat(String),
    #[error("http.auth-token must be printable ASCII without blanks")]
    AuthToken,
    #[error("http.tls needs all three of ca, cert and key")]
    TlsFiles,
    #[error("with http.tls, lease.advertise-url must begin with https://, got {0:?}")]
    InsecureUrl(String),
    #[error("invalid backup client type: {0:?}")]
    BackupType(String),
    #[error("backup path required")]
    BackupPath,
    #[error("backup.path cannot be inside fuse.dir")]
    BackupInMount,
    #[error("backup.full-sync-interval must be longer than 0s")]
    BackupInterval,
    #[error("backup.auth-token must be printable ASCII")]
    BackupToken,
    #[error("backup.url is not a URL of a server: {0:?}: {1}")]
    BackupUrl(String, String),
    #[error("proxy database name required")]
    ProxyDb,
    #[error("proxy bind address required")]
    ProxyAddr,
    #[error("proxy.target must be HOST:PORT or unix:PATH, got {0:?}")]
    ProxyTarget(String),
    #[error("{0} must be HOST:PORT or :PORT, got {1:?}")]
    Address(&'static str, String),
    #[error("proxy.addr and http.addr cannot be the same address: {0}")]
    SameAddress(String),
    #[error("a path cannot be in both proxy.passthrough and proxy.always-forward: {0:?}")]
    BothPatterns(String),
    #[error("data.dir cannot be inside fuse.dir: the mount would hide the databases from litefs")]
    DataInMount,
    #[error(
        "fuse.dir cannot be among the databases of data.dir: the mount would hide them from litefs"
    )]
    MountInData,
    #[error("fuse.enable-uring is for fuse.transport auto or uring, which is dev")]
    UringOverDev,
    #[error("lease.advertise-url must be the primary's URL, got {0:?}: {1}")]
    PrimaryUrl(String, String),
    #[error("lease.advertise-url is not a URL of this node: {0:?}: {1}")]
    NodeUrl(String, String),
}

/// Reads the file at `path`, or without one the first that exists of `./litefs.yml`,
/// `~/litefs.yml` and `/etc/litefs.yml`.
///
/// # Errors
/// Every [`Error`]: no file, an unreadable one, bad content, values that cannot work.
pub fn load(
    path: Option<&Path>,
    expansion: Expansion,
    environment: &Environment,
) -> Result<Loaded, Error> {
    let candidates = match path {
        Some(path) => vec![path.to_owned()],
        None => search_path(environment),
    };
    for candidate in candidates {
        match fs::read_to_string(&candidate) {
            Ok(text) => return load_text(candidate, &text, expansion, environment),
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Read { path: candidate, source }),
        }
    }
    Err(Error::NotFound)
}

fn search_path(environment: &Environment) -> Vec<PathBuf> {
    let home = environment.get("HOME").filter(|home| !home.is_empty());
    let home = home.map(|home| Path::new(&home).join(FILE_NAME));
    let here = Some(PathBuf::from(FILE_NAME));
    [here, home, Some(SYSTEM_FILE.into())].into_iter().flatten().collect()
}

fn load_text(
    path: PathBuf,
    text: &str,
    expansion: Expansion,
    environment: &Environment,
) -> Result<Loaded, Error> {
    let path = std::path::absolute(&path).unwrap_or(path);
    let expanded = match expansion {
        Expansion::On => expand::expand(text, &|name| environment.get(name)),
        Expansion::Off => text.to_owned(),
    };
    let mut config = parse(&path, &expanded)?;
    config.backup.heed(environment);
    match config.check() {
        Ok(()) => Ok(Loaded { config, path }),
        Err(invalid) => {
            let line = line_of(&expanded, invalid.key());
            Err(Error::Invalid { path, line, invalid })
        }
    }
}

/// Parses the text of a file; `path` is for messages only. Checks types and keys, not sense.
fn parse(path: &Path, text: &str) -> Result<Config, Error> {
    let mut bytes = text.as_bytes();
    let mut documents = serde_saphyr::read::<_, Config>(&mut bytes);
    match documents.next() {
        Some(Ok(config)) => Ok(config),
        Some(Err(error)) => Err(parse_error(path, text, &error)),
        None => Err(Error::Empty { path: path.to_owned() }),
    }
}

fn parse_error(path: &Path, text: &str, error: &serde_saphyr::Error) -> Error {
    let line = error.location().map_or(1, |location| location.line());
    Error::Parse { path: path.to_owned(), line, message: describe(error, &key_at(text, line)) }
}

/// The parser's complaint as a sentence about `key`.
fn describe(error: &serde_saphyr::Error, key: &str) -> String {
    use serde_saphyr::Error as Yaml;
    match error.without_snippet() {
        Yaml::SerdeUnknownField { field, expected, .. } => {
            format!("unknown key {field:?}, expected one of: {}", expected.join(", "))
        }
        Yaml::DuplicateMappingKey { .. } => format!("duplicate key {key:?}"),
        other => {
            let formatter = serde_saphyr::UserMessageFormatter;
            let text = serde_saphyr::MessageFormatter::format_message(&formatter, other);
            format!("{key}: {text}")
        }
    }
}

/// The key that stands on a line (counted from 1), for messages about its value.
fn key_at(text: &str, line: u64) -> String {
    let index = usize::try_from(line).unwrap_or(1).saturating_sub(1);
    let line = text.lines().nth(index).unwrap_or_default().trim();
    let key = line.strip_prefix("- ").unwrap_or(line).split(':').next().unwrap_or_default();
    key.trim().to_owned()
}

/// The line (counted from 1) of a key such as `proxy.addr`; where it does not stand, or not on a line of
/// its own, that of the innermost section around it.
fn line_of(text: &str, key: &str) -> u64 {
    let is_content = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    let lines: Vec<(u64, &str)> = (1..).zip(text.lines()).filter(|(_, l)| is_content(l)).collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let (mut block, mut found) = (&lines[..], 1);
    for word in key.split('.') {
        let Some(level) = block.first().map(|(_, line)| indent(line)) else { break };
        let is_key = |(_, line): &(u64, &str)| {
            let name = line.split(':').next().unwrap_or_default();
            indent(line) == level && name.trim() == word
        };
        let Some(at) = block.iter().position(is_key) else { break };
        found = block[at].0;
        let inside = block[at + 1..].iter().take_while(|(_, line)| indent(line) > level).count();
        block = &block[at + 1..at + 1 + inside];
    }
    found
}

impl Invalid {
    /// The key that is wrong, or that is to be set.
    fn key(&self) -> &'static str {
        match self {
            Invalid::FuseDir | Invalid::SameDir | Invalid::MountInData => "fuse.dir",
            Invalid::UringOverDev => "fuse.enable-uring",
            Invalid::DataDir | Invalid::DataInMount => "data.dir",
            Invalid::LeaseType(_) => "lease.type",
            Invalid::FilterOnCandidate => "lease.databases",
            Invalid::ConsulKey => "lease.consul.key",
            Invalid::LogFormat(_) => "log.format",
            Invalid::AuthToken => "http.auth-token",
            Invalid::TlsFiles => "http.tls",
            Invalid::InsecureUrl(_) | Invalid::PrimaryUrl(..) | Invalid::NodeUrl(..) => {
                "lease.advertise-url"
            }
            Invalid::BackupType(_) => "backup.type",
            Invalid::BackupPath | Invalid::BackupInMount => "backup.path",
            Invalid::BackupInterval => "backup.full-sync-interval",
            Invalid::BackupToken => "backup.auth-token",
            Invalid::BackupUrl(..) => "backup.url",
            Invalid::ProxyDb => "proxy.db",
            Invalid::ProxyAddr | Invalid::SameAddress(_) => "proxy.addr",
            Invalid::ProxyTarget(_) => "proxy.target",
            Invalid::Address(key, _) => key,
            Invalid::BothPatterns(_) => "proxy.always-forward",
        }
    }

    /// The message, with the key in it.
    fn with_key(&self) -> String {
        let (key, text) = (self.key(), self.to_string());
        if text.contains(key) { text } else { format!("{key}: {text}") }
    }
}

impl Config {
    /// Whether the values can work together, in the order in which users of LiteFS know them.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), Invalid> {
        self.check_directories()?;
        if self.fuse.enable_uring && self.fuse.transport == Transport::Dev {
            return Err(Invalid::UringOverDev);
        }
        self.check_lease()?;
        if !has_port(&self.http.addr) {
            return Err(Invalid::Address("http.addr", self.http.addr.clone()));
        }
        self.check_security()?;
        self.check_backup()?;
        self.check_proxy()
    }

    fn check_directories(&self) -> Result<(), Invalid> {
        if self.fuse.dir.as_os_str().is_empty() {
            return Err(Invalid::FuseDir);
        }
        if self.data.dir.as_os_str().is_empty() {
            return Err(Invalid::DataDir);
        }
        if same_directory(&self.fuse.dir, &self.data.dir) {
            return Err(Invalid::SameDir);
        }
        let (data, mount) = (absolute(&self.data.dir), absolute(&self.fuse.dir));
        match (data.starts_with(&mount), mount.starts_with(DataDir::new(&data).databases())) {
            (true, _) => Err(Invalid::DataInMount),
            (_, true) => Err(Invalid::MountInData),
            _ => Ok(()),
        }
    }

    fn check_lease(&self) -> Result<(), Invalid> {
        let Lease { kind, candidate, databases, advertise_url: url, consul, .. } = &self.lease;
        let Some(kind) = kind else { return Err(Invalid::LeaseType(String::new())) };
        if *candidate && !databases.is_empty() {
            return Err(Invalid::FilterOnCandidate);
        }
        if *kind == LeaseKind::Consul && consul.key.is_empty() {
            return Err(Invalid::ConsulKey);
        }
        let Err(error) = Url::new(url) else { return Ok(()) };
        match (kind, candidate) {
            (LeaseKind::Static, false) => Err(Invalid::PrimaryUrl(url.clone(), error.to_string())),
            (LeaseKind::Consul, _) if !url.is_empty() => {
                Err(Invalid::NodeUrl(url.clone(), error.to_string()))
            }
            // Consul: from the host name. A static primary is found by what its replicas say.
            _ => Ok(()),
        }
    }

    fn check_security(&self) -> Result<(), Invalid> {
        let Http { auth_token, tls, allow_insecure, .. } = &self.http;
        let is_printable = auth_token.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_printable {
            return Err(Invalid::AuthToken);
        }
        let files = [&tls.ca, &tls.cert, &tls.key];
        let given = files.iter().filter(|path| !path.as_os_str().is_empty()).count();
        if given != 0 && given != files.len() {
            return Err(Invalid::TlsFiles);
        }
        let url = &self.lease.advertise_url;
        match given != 0 && !allow_insecure && url.starts_with("http://") {
            true => Err(Invalid::InsecureUrl(url.clone())),
            false => Ok(()),
        }
    }

    fn check_backup(&self) -> Result<(), Invalid> {
        let file = self.backup.kind == BackupKind::File;
        if file && self.backup.path.as_os_str().is_empty() {
            return Err(Invalid::BackupPath);
        }
        if file && absolute(&self.backup.path).starts_with(absolute(&self.fuse.dir)) {
            return Err(Invalid::BackupInMount);
        }
        if self.backup.kind != BackupKind::None && self.backup.full_sync_interval.is_zero() {
            return Err(Invalid::BackupInterval);
        }
        if self.backup.kind != BackupKind::LitefsCloud {
            return Ok(());
        }
        let Backup { url, auth_token, .. } = &self.backup;
        if !auth_token.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
            return Err(Invalid::BackupToken);
        }
        match Url::new(url) {
            Ok(_) => Ok(()),
            Err(error) => Err(Invalid::BackupUrl(url.clone(), error.to_string())),
        }
    }

    fn check_proxy(&self) -> Result<(), Invalid> {
        if self.proxy.target.is_empty() {
            return Ok(());
        }
        if self.proxy.db.is_empty() {
            return Err(Invalid::ProxyDb);
        }
        let Proxy { addr, target, passthrough, always_forward, .. } = &self.proxy;
        if addr.is_empty() {
            return Err(Invalid::ProxyAddr);
        }
        if !has_port(addr) {
            return Err(Invalid::Address("proxy.addr", addr.clone()));
        }
        if *addr == self.http.addr && !addr.ends_with(":0") {
            return Err(Invalid::SameAddress(addr.clone()));
        }
        let is_target =
            target.strip_prefix("unix:").map_or(has_port(target), |path| !path.is_empty());
        if !is_target {
            return Err(Invalid::ProxyTarget(target.clone()));
        }
        match passthrough.iter().find(|pattern| always_forward.contains(pattern)) {
            Some(pattern) => Err(Invalid::BothPatterns(pattern.clone())),
            None => Ok(()),
        }
    }
}

/// Whether two paths name one directory, by their text after `.`, doubled and trailing slashes
/// are gone; symbolic links are not followed.
fn same_directory(a: &Path, b: &Path) -> bool {
    absolute(a).components().eq(absolute(b).components())
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Whether a text ends with a port.
fn has_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
}

/// A value of the file: how it reads itself. A layer over `Deserialize` because durations and
/// enums have other spellings here than serde gives them.
trait Value: Sized {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;
}

/// A value, or nothing where the file has a key and no value.
struct Nullable<T>(Option<T>);

impl<'de, T: Value> Deserialize<'de> for Nullable<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OptionVisitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Value> Visitor<'de> for OptionVisitor<T> {
            type Value = Nullable<T>;
            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a value")
            }
            fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
                Ok(Nullable(None))
            }
            fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
                Ok(Nullable(None))
            }
            fn visit_some<D: Deserializer<'de>>(self, value: D) -> Result<Self::Value, D::Error> {
                T::read(value).map(|value| Nullable(Some(value)))
            }
        }
        deserializer.deserialize_option(OptionVisitor(std::marker::PhantomData))
    }
}

/// Reads a key; one that is not in the list is an error at the key's own place.
struct KeyIn(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for KeyIn {
    type Value = &'static str;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<&'static str, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for KeyIn {
    type Value = &'static str;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<&'static str, E> {
        let known = self.0.iter().find(|known| **known == key);
        known.copied().ok_or_else(|| E::unknown_field(key, self.0))
    }
}

macro_rules! plain_values {
    ($($type:ty),*) => {$(
        impl Value for $type {
            fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::deserialize(deserializer)
            }
        }
    )*};
}
plain_values!(String, PathBuf, bool, u32, Vec<String>);

impl Value for Duration {
    /// A negative duration counts as zero, which has the same effect for every key.
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Option::<Duration>::read(deserializer).map(Option::unwrap_or_default)
    }
}

impl Value for Option<Duration> {
    /// Zero and less mean "no limit": `None`.
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let nanos = duration::parse_nanos(&text).map_err(D::Error::custom)?;
        Ok(u64::try_from(nanos).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos))
    }
}

/// A section of the file as one table: key, field, type and default stand together. Makes the
/// struct, its `Default`, and the reader that refuses unknown keys.
macro_rules! section {
    ($(#[$about:meta])* $name:ident {
        $($(#[$doc:meta])* $key:literal => $field:ident: $type:ty = $default:expr;)*
    }) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                $name { $($field: $default,)* }
            }
        }

        impl Value for $name {
            fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::deserialize(deserializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                const KEYS: &[&str] = &[$($key),*];
                struct SectionVisitor;
                impl<'de> Visitor<'de> for SectionVisitor {
                    type Value = $name;
                    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                        formatter.write_str("keys with values")
                    }
                    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<$name, A::Error> {
                        let mut section = $name::default();
                        while let Some(key) = map.next_key_seed(KeyIn(KEYS))? {
                            match key {
                                $($key => if let Some(value) = map.next_value::<Nullable<$type>>()?.0 {
                                    section.$field = value;
                                },)*
                                other => return Err(de::Error::unknown_field(other, KEYS)),
                            }
                        }
                        Ok(section)
                    }
                }
                deserializer.deserialize_map(SectionVisitor)
            }
        }
    };
}
use section;

/// A choice between words: the enum, its spellings in the file, and the message for others.
macro_rules! choice {
    ($(#[$about:meta])* $name:ident: $message:expr => {
        $($(#[$doc:meta])* $($spelling:literal)|+ => $variant:ident,)*
    }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub enum $name {
            $($(#[$doc])* $variant,)*
        }

        impl Value for $name {
            fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                match text.as_str() {
                    $($($spelling)|+ => Ok($name::$variant),)*
                    _ => Err(D::Error::custom($message(text))),
                }
            }
        }
    };
}

fn fuse_choice(expected: &'static str) -> impl Fn(String) -> String {
    move |text| format!("expected {expected}, got {text:?}")
}

choice! {
    /// Who decides which node is primary.
    LeaseKind: Invalid::LeaseType => {
        /// The configuration names the primary.
        #[default]
        "static" => Static,
        /// A session in Consul.
        "consul" => Consul,
    }
}

impl Value for Option<LeaseKind> {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        LeaseKind::read(deserializer).map(Some)
    }
}

choice! {
    /// The shape of log lines.
    LogFormat: Invalid::LogFormat => {
        /// `level=INFO msg="..." key=value`.
        #[default]
        "text" | "" => Text,
        /// One JSON object a line.
        "json" => Json,
    }
}

choice! {
    /// Where a primary sends a second copy of its transactions.
    BackupKind: Invalid::BackupType => {
        /// Nowhere.
        #[default]
        "" => None,
        /// A directory of LTX files.
        "file" => File,
        /// A server that speaks the protocol of LiteFS Cloud.
        "litefs-cloud" => LitefsCloud,
    }
}

choice! {
    /// Whether the kernel may serve reads and writes straight from the backing files.
    Passthrough: fuse_choice("auto or off") => {
        /// Wherever the kernel grants it.
        #[default]
        "auto" => Auto,
        /// Never: every read and write comes to the daemon.
        "off" | "false" => Off,
    }
}

choice! {
    /// How requests come from the kernel.
    Transport: fuse_choice("auto, uring or dev") => {
        /// io_uring where the kernel offers it and lets this process, else `/dev/fuse`.
        #[default]
        "auto" => Auto,
        /// io_uring, or an error.
        "uring" => Uring,
        /// `/dev/fuse`.
        "dev" => Dev,
    }
}

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

section! {
    /// Everything a `litefs.yml` can say.
    Config {
        /// False: after an error at start-up stay alive, for debugging, until a signal.
        "exit-on-error" => exit_on_error: bool = true;
        /// Start proxy and exec without waiting for the cluster.
        "skip-sync" => skip_sync: bool = false;
        /// Verify the whole database after every local commit; for tests.
        "strict-verify" => strict_verify: bool = false;
        /// What to run once the node is ready; the last one is supervised.
        "exec" => exec: Vec<Command> = Vec::new();
        /// The backing files and the LTX files.
        "data" => data: Data = Data::default();
        /// The mount.
        "fuse" => fuse: Fuse = Fuse::default();
        /// The API, which other nodes use too.
        "http" => http: Http = Http::default();
        /// The proxy in front of the application.
        "proxy" => proxy: Proxy = Proxy::default();
        /// Who is primary.
        "lease" => lease: Lease = Lease::default();
        /// A second copy elsewhere.
        "backup" => backup: Backup = Backup::default();
        /// Log lines.
        "log" => log: Log = Log::default();
        /// The trace file.
        "tracing" => tracing: Tracing = Tracing::default();
    }
}

section! {
    /// `data`: the backing files and the LTX files.
    Data {
        /// Where they stand.
        "dir" => dir: PathBuf = "/var/lib/litefs".into();
        /// LZ4 in LTX files that this node makes.
        "compress" => compress: bool = true;
        /// How long LTX files are kept at least; `None`: for ever.
        "retention" => retention: Option<Duration> = Some(10 * MINUTE);
        /// How often old LTX files are looked for; `None`: never.
        "retention-monitor-interval" => retention_monitor_interval: Option<Duration> = Some(MINUTE);
    }
}

section! {
    /// `fuse`: the mount.
    Fuse {
        /// The mount point; made if missing.
        "dir" => dir: PathBuf = "/litefs".into();
        /// Other users may use the mount too.
        "allow-other" => allow_other: bool = false;
        /// Log every request.
        "debug" => debug: bool = false;
        /// Kernel passthrough of file contents.
        "passthrough" => passthrough: Passthrough = Passthrough::Auto;
        /// How requests come from the kernel.
        "transport" => transport: Transport = Transport::Auto;
        /// Switch FUSE over io_uring on in the kernel (a module parameter, for the whole machine).
        "enable-uring" => enable_uring: bool = false;
    }
}

section! {
    /// `http`: the API.
    Http {
        /// Where to listen, `HOST:PORT`; an empty host means every address.
        "addr" => addr: String = ":20202".to_owned();
        /// How long one snapshot or export may take to be made; zero: as long as `data.retention`.
        "snapshot-timeout" => snapshot_timeout: Duration = Duration::ZERO;
        /// What callers must show, and what is shown to other nodes; empty: nothing.
        "auth-token" => auth_token: String = String::new();
        /// Certificates; none: everything goes in the clear.
        "tls" => tls: HttpTls = HttpTls::default();
        /// Answer callers without token or TLS too, for the time of a change-over.
        "allow-insecure" => allow_insecure: bool = false;
    }
}

section! {
    /// `http.tls`: TLS between nodes and at the API. Files are in PEM.
    HttpTls {
        /// The authorities whose certificates count.
        "ca" => ca: PathBuf = PathBuf::new();
        /// The node's certificate.
        "cert" => cert: PathBuf = PathBuf::new();
        /// Its key.
        "key" => key: PathBuf = PathBuf::new();
        /// Callers must have a certificate of such an authority too.
        "verify-client" => verify_client: bool = true;
    }
}

impl HttpTls {
    /// The node's certificate and key; none if there is no TLS.
    pub fn identity(&self) -> Option<Identity> {
        let HttpTls { cert, key, .. } = self;
        let is_set = !cert.as_os_str().is_empty();
        is_set.then(|| Identity { certificate: cert.clone(), key: key.clone() })
    }
}

section! {
    /// `proxy`: in front of the application.
    Proxy {
        /// Where to listen, `HOST:PORT`.
        "addr" => addr: String = String::new();
        /// The application, `HOST:PORT`; empty: no proxy.
        "target" => target: String = String::new();
        /// The database whose position a client must have seen.
        "db" => db: String = String::new();
        /// The lag above which the node counts as unhealthy; zero: never.
        "max-lag" => max_lag: Duration = 10 * SECOND;
        /// Log each decision.
        "debug" => debug: bool = false;
        /// Paths that go to the application as they are.
        "passthrough" => passthrough: Vec<String> = Vec::new();
        /// Paths that count as writes whatever their method.
        "always-forward" => always_forward: Vec<String> = Vec::new();
        /// How long a write waits for a primary to be known.
        "primary-redirect-timeout" => primary_redirect_timeout: Duration = 5 * SECOND;
        /// Limit for reading a request; zero: none.
        "read-timeout" => read_timeout: Duration = Duration::ZERO;
        /// Limit for reading a request's headers; zero: none.
        "read-header-timeout" => read_header_timeout: Duration = 10 * SECOND;
        /// Limit for writing a response; zero: none.
        "write-timeout" => write_timeout: Duration = Duration::ZERO;
        /// How long an idle connection is kept; zero: for ever.
        "idle-timeout" => idle_timeout: Duration = 30 * SECOND;
    }
}

section! {
    /// `lease`: who is primary.
    Lease {
        /// Required; `None` only in a configuration that was not checked.
        "type" => kind: Option<LeaseKind> = None;
        /// This node's name to others; static lease: the primary's name, on every node.
        "hostname" => hostname: String = String::new();
        /// This node's URL to others; static lease: the primary's URL, on every node.
        "advertise-url" => advertise_url: String = String::new();
        /// May become primary; static lease: is the primary.
        "candidate" => candidate: bool = true;
        /// A candidate asks once, after its first sync, to become primary.
        "promote" => promote: bool = false;
        /// The wait before a replica connects again.
        "reconnect-delay" => reconnect_delay: Duration = SECOND;
        /// How long a demoted primary does not try to become primary.
        "demote-delay" => demote_delay: Duration = 10 * SECOND;
        /// Only these databases are replicated; empty: all.
        "databases" => databases: Vec<String> = Vec::new();
        /// Consul's address and key.
        "consul" => consul: Consul = Consul::default();
    }
}

section! {
    /// `lease.consul`.
    Consul {
        /// Consul's URL; a password in it is the token.
        "url" => url: String = String::new();
        /// The key of this cluster.
        "key" => key: String = String::new();
        /// Session lifetime.
        "ttl" => ttl: ConsulTtl = ConsulTtl::default();
        /// How long Consul refuses the key after a session was lost.
        "lock-delay" => lock_delay: ConsulLockDelay = ConsulLockDelay::default();
    }
}

/// A duration of which zero and less mean the default, `DEFAULT_MS` milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrDefault<const DEFAULT_MS: u64>(pub Duration);

/// `lease.consul.ttl`: 10 s by default.
pub type ConsulTtl = OrDefault<10_000>;
/// `lease.consul.lock-delay`: 1 s by default.
pub type ConsulLockDelay = OrDefault<1_000>;

impl<const DEFAULT_MS: u64> Default for OrDefault<DEFAULT_MS> {
    fn default() -> Self {
        OrDefault(Duration::from_millis(DEFAULT_MS))
    }
}

impl<const DEFAULT_MS: u64> Value for OrDefault<DEFAULT_MS> {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::<Duration>::read(deserializer)?.map_or_else(Self::default, OrDefault))
    }
}

section! {
    /// `backup`: a second copy elsewhere.
    Backup {
        /// What kind of place.
        "type" => kind: BackupKind = BackupKind::None;
        /// The directory, for `file`.
        "path" => path: PathBuf = PathBuf::new();
        /// The server, for `litefs-cloud`.
        "url" => url: String = "https://litefs.fly.io".to_owned();
        /// The cluster's name on the server.
        "cluster" => cluster: String = String::new();
        /// The value of the `Authorization` header, as it is.
        "auth-token" => auth_token: String = String::new();
        /// How long changes are gathered before they are sent.
        "delay" => delay: Duration = SECOND;
        /// How often the backup is asked where it stands.
        "full-sync-interval" => full_sync_interval: Duration = 10 * SECOND;
    }
}

impl Backup {
    /// Takes what the environment says, as LiteFS does: a token makes a server the backup unless something
    /// else is one.
    fn heed(&mut self, environment: &Environment) {
        let token = environment.get("LITEFS_CLOUD_TOKEN").unwrap_or_default();
        let token = token.trim();
        if token.is_empty() || self.kind == BackupKind::File {
            return;
        }
        self.kind = BackupKind::LitefsCloud;
        if self.auth_token.is_empty() {
            self.auth_token = token.to_owned();
        }
        if let Some(url) = environment.get("LITEFS_CLOUD_ENDPOINT").filter(|url| !url.is_empty()) {
            self.url = url;
        }
    }
}

section! {
    /// `log`: log lines.
    Log {
        /// Their shape.
        "format" => format: LogFormat = LogFormat::Text;
        /// A time on each line.
        "timestamp" => timestamp: bool = false;
        /// Debug lines too.
        "debug" => debug: bool = false;
    }
}

section! {
    /// `tracing`: the trace file.
    Tracing {
        /// Only effective with a path.
        "enabled" => enabled: bool = true;
        /// The file; empty: none.
        "path" => path: PathBuf = PathBuf::new();
        /// Size in MB at which a new file is begun.
        "max-size" => max_size_mb: u32 = 64;
        /// How many old files are kept.
        "max-count" => max_count: u32 = 8;
        /// Old files are compressed.
        "compress" => compress: bool = true;
    }
}

#[cfg(test)]
mod tests;
