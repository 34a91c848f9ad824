//! The configuration file: defaults, every key, and what is refused, with the message.

use super::*;

fn read(text: &str) -> Result<Config, Error> {
    parse(Path::new("/etc/litefs.yml"), text)
}

#[track_caller]
fn refused(text: &str, message: &str) {
    assert_eq!(read(text).unwrap_err().to_string(), message);
}

#[track_caller]
fn invalid(text: &str, message: &str) {
    assert_eq!(read(text).unwrap().check().unwrap_err().to_string(), message);
}

#[test]
fn defaults_stand_where_the_file_is_silent() {
    let config = read("lease:\n  type: static\n").unwrap();
    let lease = Lease { kind: Some(LeaseKind::Static), ..Lease::default() };
    assert_eq!(config, Config { lease, ..Config::default() });
    assert_eq!(config.data.retention, Some(Duration::from_secs(600)));
    assert_eq!(config.lease.consul.ttl.0, Duration::from_secs(10));
    assert_eq!(config.lease.consul.lock_delay.0, Duration::from_secs(1));
    config.check().unwrap();
}

#[test]
fn a_key_without_a_value_keeps_its_default() {
    let config =
        read("data:\nfuse:\n  dir:\nlease:\n  candidate: \n  type: static\nexec:\n").unwrap();
    assert_eq!(config.data, Data::default());
    assert_eq!(config.fuse, Fuse::default());
    assert!(config.lease.candidate);
    assert_eq!(config.exec, Vec::new());
}

#[test]
fn the_example_file_shows_every_key_with_its_default() {
    let text = include_str!("../../litefs.yml.example");
    let config = read(text).unwrap();
    config.check().unwrap();
    let lease = Lease {
        kind: Some(LeaseKind::Static),
        hostname: "node-1".to_owned(),
        advertise_url: "http://node-1:20202".to_owned(),
        ..Lease::default()
    };
    assert_eq!(config, Config { lease, ..Config::default() });
    let example: serde_json::Value = serde_saphyr::from_str(text).unwrap();
    let mut lines = text.lines();
    for key in keys() {
        let pointer = format!("/{}", key.replace('.', "/"));
        assert!(example.pointer(&pointer).is_some(), "{key} is missing in the example");
        // In their order.
        let name = format!("{}:", key.rsplit('.').next().unwrap());
        let found = lines.any(|line| line.trim_start().starts_with(&name));
        assert!(found, "{key} does not stand in the order of the reader");
    }
}

/// The page about the configuration has each key.
#[test]
fn the_documentation_names_every_key() {
    let page = include_str!("../../docs/configuration.md");
    for key in keys() {
        assert!(page.contains(&format!("\n| `{key}` | ")), "{key} is missing");
    }
}

/// Every key with a value, taken from the reader's own refusals.
fn keys() -> Vec<String> {
    let mut keys = Vec::new();
    add_keys(&mut keys, "");
    keys
}

fn add_keys(keys: &mut Vec<String>, section: &str) {
    let text = nested(section, "x: 1");
    let message = read(&text).unwrap_err().to_string();
    let (_, list) = message.split_once("expected one of: ").unwrap();
    for name in list.split(", ") {
        let key = if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") };
        let inside = read(&nested(&key, "x: 1")).unwrap_err().to_string();
        if key != "exec" && inside.contains("expected one of: ") {
            add_keys(keys, &key);
        } else {
            keys.push(key);
        }
    }
}

/// A file in which `inside` stands in a section such as `lease.consul`.
fn nested(section: &str, inside: &str) -> String {
    let words = section.split('.').filter(|word| !word.is_empty()).rev();
    words.fold(inside.to_owned(), |inside, word| format!("{word}: {{{inside}}}")) + "\n"
}

/// The keys of LiteFS 0.5.14 with what they are where the file is silent.
#[test]
fn keys_and_defaults_are_those_of_litefs() {
    let table = "
exit-on-error true, skip-sync false, strict-verify false, exec ~,
data.dir /var/lib/litefs, data.compress true, data.retention 10m, data.retention-monitor-interval 1m,
fuse.dir /litefs, fuse.allow-other false, fuse.debug false,
http.addr :20202, http.snapshot-timeout 0s,
proxy.addr ~, proxy.target ~, proxy.db ~, proxy.max-lag 10s, proxy.debug false, proxy.passthrough [],
proxy.always-forward [], proxy.primary-redirect-timeout 5s, proxy.read-timeout 0s,
proxy.read-header-timeout 10s, proxy.write-timeout 0s, proxy.idle-timeout 30s,
lease.type ~, lease.hostname ~, lease.advertise-url ~, lease.candidate true, lease.promote false,
lease.reconnect-delay 1s, lease.demote-delay 10s, lease.databases [],
lease.consul.url ~, lease.consul.key ~, lease.consul.ttl 10s, lease.consul.lock-delay 1s,
backup.type ~, backup.path ~, backup.url https://litefs.fly.io, backup.cluster ~, backup.auth-token ~,
log.format text, log.timestamp false, log.debug false,
tracing.enabled true, tracing.path ~, tracing.max-size 64, tracing.max-count 8, tracing.compress true";
    let rows = table.split(',').map(|row| row.trim().split_once(' ').unwrap());
    let known = keys();
    for (key, default) in rows {
        assert!(known.iter().any(|known| known == key), "{key}");
        let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
        let quoted =
            if default.contains(':') { format!("'{default}'") } else { default.to_owned() };
        let config = read(&nested(section, &format!("{name}: {quoted}"))).unwrap();
        assert_eq!(config, Config::default(), "{key}");
    }
    // Where `~`, which is nothing, stands for it: the texts are empty, and nothing is run.
    let Config { exec, proxy, lease, backup, tracing, .. } = Config::default();
    let texts = [&proxy.addr, &proxy.target, &proxy.db, &lease.hostname, &lease.advertise_url];
    let more = [&lease.consul.url, &lease.consul.key, &backup.cluster, &backup.auth_token];
    assert!(texts.into_iter().chain(more).all(String::is_empty));
    assert!([&backup.path, &tracing.path].iter().all(|path| path.as_os_str().is_empty()));
    assert_eq!((exec.len(), lease.kind, backup.kind), (0, None, BackupKind::None));
}

/// YAML 1.1 has more of them than 1.2.
#[test]
fn booleans_are_read_as_in_yaml_1_1() {
    for word in ["yes", "Yes", "on", "true", "True", "y"] {
        assert!(read(&format!("skip-sync: {word}\n")).unwrap().skip_sync, "{word}");
    }
    for word in ["no", "off", "OFF", "false", "n"] {
        assert!(!read(&format!("exit-on-error: {word}\n")).unwrap().exit_on_error, "{word}");
    }
}

/// The message of a file whose values contradict each other.
#[track_caller]
fn contradicts(text: &str, message: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("litefs.yml");
    crate::os::write_atomic("test", &file, text.as_bytes()).unwrap();
    let error = load(Some(&file), Expansion::On, &Environment::default()).unwrap_err();
    assert_eq!(error.to_string().replace(file.to_str().unwrap(), "FILE"), message);
}

#[test]
fn contradictions_name_file_line_and_key() {
    let same = "fuse.dir: fuse directory and data directory cannot be the same path";
    contradicts(
        "data:\n  dir: /a\n\n# b\nfuse:\n  debug: true\n  dir: /a\n",
        &format!("FILE:7: {same}"),
    );
    contradicts("data: {dir: /a}\nfuse: {dir: /a}\n", &format!("FILE:2: {same}"));
    let key = "lease.consul.key: consul lease key required";
    contradicts(
        "lease:\n  type: consul\n  consul:\n    url: x\n  candidate: true\n",
        &format!("FILE:3: {key}"),
    );
    let missing = "lease.type: invalid lease type, must be either 'consul' or 'static', got: ''";
    contradicts("skip-sync: true\n", &format!("FILE:1: {missing}"));
    let address = "proxy.addr must be HOST:PORT or :PORT, got \"8080\"";
    let proxy = "proxy:\n  target: ':1'\n  db: d\n  addr: '8080'\nlease: {type: static}\n";
    contradicts(proxy, &format!("FILE:4: {address}"));
}

#[test]
fn values_of_every_kind_are_read() {
    let text = "
exit-on-error: no
data: {dir: /d, compress: false, retention: 0s, retention-monitor-interval: -1s}
fuse: {passthrough: off, transport: uring, enable-uring: true}
http: {addr: 'localhost:1', snapshot-timeout: 1m30s}
proxy: {passthrough: ['*.js', /x/*], max-lag: 0}
lease: {type: consul, consul: {key: k, ttl: 0s, lock-delay: 5s}}
log: {format: json, debug: true}
tracing: {max-size: 5}
";
    let config = read(text).unwrap();
    assert!(!config.exit_on_error);
    assert_eq!((config.data.retention, config.data.retention_monitor_interval), (None, None));
    assert_eq!(
        (config.fuse.passthrough, config.fuse.transport),
        (Passthrough::Off, Transport::Uring)
    );
    assert_eq!(config.http.snapshot_timeout, Duration::from_secs(90));
    assert_eq!(config.proxy.passthrough, ["*.js", "/x/*"]);
    assert_eq!(config.proxy.max_lag, Duration::ZERO);
    assert_eq!(config.lease.kind, Some(LeaseKind::Consul));
    assert_eq!(config.lease.consul.ttl, ConsulTtl::default());
    assert_eq!(config.lease.consul.lock_delay.0, Duration::from_secs(5));
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.tracing.max_size_mb, 5);
    config.check().unwrap();
}

#[test]
fn exec_is_a_string_or_a_list() {
    let command = |words: &[&str], if_candidate| Command {
        words: words.iter().map(|word| (*word).to_owned()).collect(),
        if_candidate,
    };
    assert_eq!(read("exec: app -x 'a b'\n").unwrap().exec, [command(&["app", "-x", "a b"], false)]);
    assert_eq!(read("exec: ''\n").unwrap().exec, []);
    let list = "exec:\n  - cmd: migrate\n    if-candidate: true\n  - cmd: app\n";
    let expected = [command(&["migrate"], true), command(&["app"], false)];
    assert_eq!(read(list).unwrap().exec, expected);
}

#[test]
fn a_second_document_is_not_read() {
    assert!(read("skip-sync: true\n---\n[}\n").unwrap().skip_sync);
}

#[test]
fn refusals_name_file_line_and_key() {
    refused(
        "lease:\n  type: static\n\ndata:\n  retentoin: 1m\n",
        "/etc/litefs.yml:5: unknown key \"retentoin\", expected one of: dir, compress, retention, \
         retention-monitor-interval",
    );
    refused(
        "exec:\n  - cmd: a\n    if-primary: true\n",
        "/etc/litefs.yml:3: unknown key \"if-primary\", expected one of: cmd, if-candidate",
    );
    refused("log: {}\nlog: {}\n", "/etc/litefs.yml:2: duplicate key \"log\"");
    refused("skip-sync: 5\n", "/etc/litefs.yml:1: skip-sync: invalid boolean");
    refused(
        "data:\n  retention: 5\n",
        "/etc/litefs.yml:2: retention: invalid duration \"5\": a unit is missing: ns, us, ms, s, m or h",
    );
    refused(
        "lease:\n  type: raft\n",
        "/etc/litefs.yml:2: type: invalid lease type, must be either 'consul' or 'static', got: 'raft'",
    );
    refused("log:\n  format: xml\n", "/etc/litefs.yml:2: format: invalid log format: \"xml\"");
    refused(
        "fuse:\n  transport: x\n",
        "/etc/litefs.yml:2: transport: expected auto, uring or dev, got \"x\"",
    );
    refused("fuse: /litefs\n", "/etc/litefs.yml:1: fuse: expected mapping start");
    refused("- a\n", "/etc/litefs.yml:1: a: expected mapping start");
    refused("http:\n  addr: 'b\n", "/etc/litefs.yml:2: addr: unclosed quote");
}

#[test]
fn bad_exec_is_refused() {
    refused(
        "exec: a && b\n",
        "/etc/litefs.yml:1: exec: cannot parse exec command: '&' is a shell operator and there \
         is no shell: quote it, or run sh -c '...'",
    );
    refused(
        "exec:\n  - cmd: a\n  - cmd: \"'b\"\n",
        "/etc/litefs.yml:3: cmd: cannot parse exec command: a quote is not closed",
    );
    for text in
        ["exec: 5\n", "exec: true\n", "exec: [a]\n", "exec: {cmd: a}\n", "exec: [{cmd: ''}]\n"]
    {
        assert!(matches!(read(text), Err(Error::Parse { line: 1, .. })), "{text:?}");
    }
}

#[test]
fn an_empty_file_is_refused() {
    for text in ["", "\n", "# a comment\n", "---\n"] {
        refused(text, "config file is empty: /etc/litefs.yml");
    }
}

#[test]
fn values_that_cannot_work_are_refused_in_order() {
    invalid("fuse: {dir: ''}\ndata: {dir: ''}\n", "fuse directory required");
    invalid("data: {dir: ''}\n", "data directory required");
    let same = "fuse directory and data directory cannot be the same path";
    invalid("fuse: {dir: /a/b}\ndata: {dir: /a//b/.}\n", same);
    invalid("{}\n", "invalid lease type, must be either 'consul' or 'static', got: ''");
    let filter = "cannot specify a database replication filter on candidate nodes";
    invalid("lease: {type: static, databases: [a]}\n", filter);
    invalid("lease: {type: consul}\n", "consul lease key required");
    let lease = "lease: {type: static}\n";
    invalid(&format!("{lease}backup: {{type: file}}\n"), "backup path required");
    let backup = |keys: &str| format!("{lease}backup: {{{keys}}}\n");
    invalid(&backup("type: file, path: /litefs/b"), "backup.path cannot be inside fuse.dir");
    let text = "backup.full-sync-interval must be longer than 0s";
    invalid(&backup("type: file, path: /b, full-sync-interval: 0s"), text);
    let text = "backup.url is not a URL of a server: \"s3://b\": invalid URL scheme";
    invalid(&backup("type: litefs-cloud, url: 's3://b'"), text);
    let text = "backup.auth-token must be printable ASCII";
    invalid(&backup("type: litefs-cloud, auth-token: 'ä'"), text);
    invalid(&format!("{lease}proxy: {{target: ':1'}}\n"), "proxy database name required");
    invalid(&format!("{lease}proxy: {{target: ':1', db: d}}\n"), "proxy bind address required");
    let proxy = |keys: &str| format!("{lease}proxy: {{db: d, {keys}}}\n");
    let text = "proxy.addr must be HOST:PORT or :PORT, got \"8080\"";
    invalid(&proxy("target: ':1', addr: '8080'"), text);
    let text = "proxy.target must be HOST:PORT or unix:PATH, got \"localhost\"";
    invalid(&proxy("target: localhost, addr: ':2'"), text);
    invalid(
        &proxy("target: ':1', addr: ':20202'"),
        "proxy.addr and http.addr cannot be the same address: :20202",
    );
    invalid(
        &proxy("target: ':1', addr: ':2', passthrough: [/a], always-forward: [/b, /a]"),
        "a path cannot be in both proxy.passthrough and proxy.always-forward: \"/a\"",
    );
    let text = "http.addr must be HOST:PORT or :PORT, got \"localhost\"";
    invalid(&format!("{lease}http: {{addr: localhost}}\n"), text);
    invalid(
        "fuse: {dir: /a}\ndata: {dir: /a/b}\n",
        "data.dir cannot be inside fuse.dir: the mount would hide the databases from litefs",
    );
    invalid(
        "fuse: {dir: /a/dbs/x}\ndata: {dir: /a/}\n",
        "fuse.dir cannot be among the databases of data.dir: the mount would hide them from litefs",
    );
    read(&format!("{lease}fuse: {{dir: /a/mnt}}\ndata: {{dir: /a}}\n")).unwrap().check().unwrap();
    invalid(
        &format!("{lease}fuse: {{transport: dev, enable-uring: true}}\n"),
        "fuse.enable-uring is for fuse.transport auto or uring, which is dev",
    );
    let url = |kind: &str, url: &str| format!("lease: {{type: {kind}, advertise-url: '{url}'}}\n");
    invalid(
        &url("static, candidate: false", "a:20202"),
        "lease.advertise-url must be the primary's URL, got \"a:20202\": invalid URL scheme",
    );
    invalid(
        "lease: {type: static, candidate: false}\n",
        "lease.advertise-url must be the primary's URL, got \"\": invalid URL scheme",
    );
    invalid(
        &url("consul, consul: {key: k}", "http://:1"),
        "lease.advertise-url is not a URL of this node: \"http://:1\": URL host required",
    );
    read(&proxy("target: 'unix:/run/app.sock', addr: 'localhost:2'")).unwrap().check().unwrap();
}

#[test]
fn the_first_file_of_the_search_is_taken() {
    let home = tempfile::tempdir().unwrap();
    let environment =
        Environment::from([("HOME", home.path().to_str().unwrap()), ("DIR", "/data")]);
    let file = home.path().join("litefs.yml");
    crate::os::write_atomic("test", &file, b"lease: {type: static}\ndata: {dir: $DIR}\n").unwrap();
    let loaded = load(None, Expansion::On, &environment).unwrap();
    assert_eq!((loaded.path, loaded.config.data.dir), (file.clone(), "/data".into()));
    let literal = load(Some(&file), Expansion::Off, &environment).unwrap();
    assert_eq!(literal.config.data.dir, Path::new("$DIR"));
}

#[test]
fn a_token_in_the_environment_makes_a_server_the_backup() {
    let environment = Environment::from([
        ("LITEFS_CLOUD_TOKEN", " cluster abc\n"),
        ("LITEFS_CLOUD_ENDPOINT", "http://backup:8080"),
    ]);
    let heeded = |backup: Backup| {
        let mut backup = backup;
        backup.heed(&environment);
        (backup.kind, backup.auth_token, backup.url)
    };
    let cloud =
        |token: &str| (BackupKind::LitefsCloud, token.to_owned(), "http://backup:8080".to_owned());
    assert_eq!(heeded(Backup::default()), cloud("cluster abc"));
    let own = Backup { auth_token: "own".to_owned(), ..Backup::default() };
    assert_eq!(heeded(own), cloud("own"));
    let file = Backup { kind: BackupKind::File, ..Backup::default() };
    assert_eq!(heeded(file.clone()), (BackupKind::File, String::new(), file.url));
    let mut without = Backup::default();
    without.heed(&Environment::from([("LITEFS_CLOUD_ENDPOINT", "http://backup:8080")]));
    assert_eq!(without, Backup::default());
}

#[test]
fn a_named_file_must_exist() {
    let error =
        load(Some(Path::new("/nonexistent/litefs.yml")), Expansion::On, &Environment::default());
    assert!(matches!(error, Err(Error::Read { .. })));
}
