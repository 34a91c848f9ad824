//! What is handed out beside the program: images, the compose file, the service, configurations. No Docker
//! runs here, so what can be told from the files is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::node::{Member, Node, Settings};
use crate::support::{program, wait};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn configurations_that_are_handed_out_are_valid() {
    for file in ["litefs.yml.example", "packaging/wordpress/litefs.yml"] {
        let mut command = Command::new(program::litefs());
        command.args(["config", "check", "-config"]).arg(root().join(file));
        command.env("HOSTNAME", "one").env("CONSUL_URL", "http://consul:8500");
        let output = program::output(&mut command).unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{file}: {complaint}");
    }
}

#[test]
fn what_the_compose_file_names_is_there() {
    let path = "packaging/wordpress/compose.yaml";
    let compose: Value = serde_saphyr::from_str(&read(path)).unwrap();
    let services = compose["services"].as_object().unwrap();
    let list = |value: &Value| -> Vec<String> {
        let words = value.as_array().into_iter().flatten();
        words.map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    let mut ports = BTreeSet::new();
    for (name, service) in services {
        for volume in list(&service["volumes"]) {
            let (volume, _) = volume.split_once(':').unwrap();
            assert!(compose["volumes"].get(volume).is_some(), "{name}: no volume {volume}");
        }
        for port in list(&service["ports"]) {
            let (outside, inside) = port.rsplit_once(':').unwrap();
            assert!(ports.insert(outside.to_owned()), "{name}: port {outside} is taken");
            let is_local = outside.starts_with("127.0.0.1:");
            assert!(is_local || inside != "20202", "{name}: {port} shows an API without a token");
        }
        for other in list(&service["depends_on"]) {
            assert!(services.contains_key(&other), "{name}: no service {other}");
        }
        let build = &service["build"];
        if build.is_object() {
            let context =
                root().join("packaging/wordpress").join(build["context"].as_str().unwrap());
            let dockerfile = context.join(build["dockerfile"].as_str().unwrap());
            assert!(dockerfile.is_file(), "{name}: no {}", dockerfile.display());
        } else {
            assert!(
                service["image"].is_string() || service.get("<<").is_some(),
                "{name}: no image"
            );
        }
    }
    // What the nodes read from their environment is set, and the ports are those of their configuration.
    let node = &services["one"];
    let config = read("packaging/wordpress/litefs.yml");
    assert!(config.contains("${CONSUL_URL}") && node["environment"]["CONSUL_URL"].is_string());
    assert!(config.contains("addr: \":8080\""));
    assert!(list(&node["ports"]).iter().any(|port| port.ends_with(":8080")));
}

/// The instructions of a Dockerfile: keyword and the rest, continued lines joined, comments left out.
fn instructions(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let text = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let (keyword, rest) = line.split_once(' ').unwrap();
            (keyword.to_owned(), rest.trim().to_owned())
        })
        .collect()
}

#[test]
fn a_dockerfile_copies_what_is_there() {
    let known =
        "FROM RUN COPY WORKDIR ARG ENV VOLUME EXPOSE HEALTHCHECK ENTRYPOINT CMD SHELL".split(' ');
    let known: BTreeSet<&str> = known.collect();
    let manifest = read("Cargo.toml");
    let rust = manifest.lines().find_map(|line| line.strip_prefix("rust-version = ")).unwrap();
    let rust = rust.trim_matches('"');
    for file in ["Dockerfile", "packaging/wordpress/Dockerfile"] {
        let mut stages = BTreeSet::new();
        let instructions = instructions(&read(file));
        for (keyword, rest) in &instructions {
            assert!(known.contains(keyword.as_str()), "{file}: {keyword}");
            let words: Vec<&str> = rest.split_whitespace().collect();
            match keyword.as_str() {
                "FROM" => {
                    let (image, tag) = words[0].split_once(':').unwrap_or((words[0], ""));
                    let pinned = image == "scratch" || (!tag.is_empty() && tag != "latest");
                    assert!(pinned, "{file}: {rest} has no version");
                    if image == "rust" {
                        assert!(
                            tag.starts_with(&format!("{rust}-")),
                            "{file}: {tag} is not {rust}"
                        );
                    }
                    if let [_, "AS", stage] = words[..] {
                        stages.insert(stage.to_owned());
                    }
                }
                "COPY" => match words[0].strip_prefix("--from=") {
                    Some(stage) => assert!(stages.contains(stage), "{file}: no stage {stage}"),
                    None => {
                        for source in &words[..words.len() - 1] {
                            assert!(root().join(source).exists(), "{file}: no {source}");
                        }
                    }
                },
                "ENTRYPOINT" => assert_eq!(rest, "[\"litefs\"]", "{file}"),
                "CMD" => assert_eq!(rest, "[\"mount\"]", "{file}"),
                "RUN" => check_shell(file, rest),
                _ => {}
            }
        }
        let has = |word: &str| instructions.iter().any(|(keyword, _)| keyword == word);
        assert!(has("ENTRYPOINT") && has("CMD"), "{file}");
    }
}

/// The shell can read the command.
#[track_caller]
fn check_shell(file: &str, command: &str) {
    let words = command.split_whitespace().skip_while(|word| word.starts_with("--"));
    let script = words.collect::<Vec<_>>().join(" ");
    let output = program::output(Command::new("bash").args(["-n", "-c", &script])).unwrap();
    assert!(output.status.success(), "{file}: {script}");
}

/// A setting of the service.
#[track_caller]
fn of_service(key: &str) -> String {
    let unit = read("packaging/litefs.service");
    let mut values = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    values.next().unwrap_or_else(|| panic!("no {key}")).to_owned()
}

/// What the service runs until its node is ready.
#[track_caller]
fn service_start_post() -> String {
    let script = of_service("ExecStartPost");
    script.strip_prefix("/bin/sh -c '").unwrap().strip_suffix('\'').unwrap().to_owned()
}

#[test]
fn the_service_starts_what_is_there() {
    let unit = read("packaging/litefs.service");
    let lines = unit.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    for line in lines {
        let section = line.starts_with('[') && line.ends_with(']');
        let key = line.split_once('=').map_or("", |(key, _)| key);
        let is_key = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric());
        assert!(section || is_key, "{line}");
    }
    assert_eq!(of_service("ExecStart"), "/usr/local/bin/litefs mount -config /etc/litefs.yml");
    // Of the grace that an application has, and what is sent and handed over after it, nothing is cut off.
    let stop: u64 = of_service("TimeoutStopSec").parse().unwrap();
    assert!(stop >= 30, "{stop}");
    assert_eq!(of_service("StateDirectory"), "litefs", "of data.dir, /var/lib/litefs");
    check_shell("litefs.service", &service_start_post());
}

/// The service manager waits for this script before it starts a service again that has ended.
#[test]
fn the_service_is_ready_with_its_node_and_ends_with_it() {
    let mut node = Node::new(&Settings::default(), Member::Primary);
    let config = node.scratch("litefs.yml").display().to_string();
    let script = service_start_post().replace("/usr/local/bin/litefs", program::litefs());
    let script = script.replace("/etc/litefs.yml", &config);
    let code_with = |pid: u32| {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).env("MAINPID", pid.to_string());
        program::output(&mut command).unwrap().status.code()
    };
    let mut ended = Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    assert_eq!(code_with(ended.id()), Some(1));
    node.start();
    assert_eq!(code_with(node.pid().as_raw().cast_unsigned()), Some(0));
}

/// A replica knows its primary long before it has its data.
#[test]
fn a_replica_is_ready_when_it_has_what_its_primary_has() {
    let mut primary = Node::new(&Settings::default(), Member::Primary);
    let mut replica = Node::new(&Settings::default(), Member::Replica(&primary.url()));
    let ready = |node: &Node| {
        let output = node.litefs("status", &["-json"]).stdout;
        let status: serde_json::Value = serde_json::from_slice(&output).unwrap_or_default();
        (status["role"].as_str().map(str::to_owned), status["ready"].as_bool())
    };
    replica.spawn();
    let follows = (Some("replica".to_owned()), Some(false));
    wait::until_true("the replica's role", || ready(&replica) == follows);
    primary.start();
    replica.wait_ready();
    assert_eq!(ready(&replica), (Some("replica".to_owned()), Some(true)));
    assert_eq!(ready(&primary), (Some("primary".to_owned()), Some(true)));
}

/// All scripts that people or other scripts call can be read by their shell.
#[test]
fn scripts_can_be_read_by_their_shell() {
    let scripts =
        ["packaging/wordpress/try", "packaging/prove", ".ci/wordpress", ".ci/better-sqlite3"];
    let scripts: [PathBuf; 4] = scripts.map(|path| root().join(path));
    for script in scripts {
        let output = program::output(Command::new("bash").arg("-n").arg(&script)).unwrap();
        assert!(output.status.success(), "{}", script.display());
    }
}
