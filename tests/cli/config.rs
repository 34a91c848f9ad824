//! What `mount` says about its flags and its configuration, before it mounts anything.

use std::fs;

use test_case::test_case;

use super::{Expected, check, litefs};

/// Runs `mount` with a configuration file of this text; the file stands for `FILE` in `message`.
#[track_caller]
fn refused(text: &str, message: &str) {
    refused_with(text, &[], message);
}

#[track_caller]
fn refused_with(text: &str, flags: &[&str], message: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("litefs.yml");
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let arguments = [&["mount", "-config", path], flags].concat();
    let stderr = format!("ERROR: {}\n", message.replace("FILE", path));
    check(&arguments, Expected { code: 2, stdout: "", stderr: &stderr });
}

#[test]
fn a_missing_file_is_named() {
    let stderr = "ERROR: config file not found\n";
    check(&["mount"], Expected { code: 2, stdout: "", stderr });
    let stderr = "ERROR: cannot read config file at /nonexistent.yml: No such file or directory \
                  (os error 2)\n";
    check(&["mount", "-config", "/nonexistent.yml"], Expected { code: 2, stdout: "", stderr });
}

/// As in LiteFS, and so a script may pass a variable that is empty.
#[test_case(&["mount", "-config", ""])]
#[test_case(&["mount", "-config="])]
#[test_case(&["config", "check", "-config", ""])]
fn an_empty_name_of_a_file_is_none(arguments: &[&str]) {
    let stderr = "ERROR: config file not found\n";
    check(arguments, Expected { code: 2, stdout: "", stderr });
}

#[test]
fn an_unknown_key_is_named_with_file_and_line() {
    refused(
        "lease:\n  type: static\n  canddidate: true\n",
        "FILE:3: unknown key \"canddidate\", expected one of: type, hostname, advertise-url, \
         candidate, promote, reconnect-delay, demote-delay, databases, consul",
    );
}

#[test]
fn values_that_cannot_work_are_named() {
    refused("", "config file is empty: FILE");
    let kind = "invalid lease type, must be either 'consul' or 'static', got: ''";
    refused("{}\n", &format!("FILE:1: lease.type: {kind}"));
    refused("log: {}\nfuse: {dir: ''}\n", "FILE:2: fuse.dir: fuse directory required");
    refused(
        "exec: a && b\n",
        "FILE:1: exec: cannot parse exec command: '&' is a shell operator and there is no shell: \
         quote it, or run sh -c '...'",
    );
}

#[test]
fn variables_are_replaced_unless_switched_off() {
    let text = "lease: {type: \"${LEASE:-raft}\"}\n";
    let message = "invalid lease type, must be either 'consul' or 'static', got";
    refused(text, &format!("FILE:1: lease: {message}: 'raft'"));
    refused_with(
        text,
        &["-no-expand-env"],
        &format!("FILE:1: lease: {message}: '${{LEASE:-raft}}'"),
    );
}

#[test]
fn words_before_the_separator_are_refused() {
    let stderr = "ERROR: too many arguments, specify a '--' to specify an exec command\n";
    check(&["mount", "myapp"], Expected { code: 2, stdout: "", stderr });
}

#[test]
fn flags_that_contradict_each_other_are_refused() {
    let error = |stderr| Expected { code: 2, stdout: "", stderr };
    let both = "ERROR: cannot specify both -config & -standalone\n";
    check(&["mount", "-standalone", "-config", "x"], error(both));
    let alone = "ERROR: -data-dir needs -standalone; else the configuration file says it\n";
    check(&["mount", "-data-dir", "x"], error(alone));
    let same = "ERROR: fuse directory and data directory cannot be the same path\n";
    check(&["mount", "-standalone", "-data-dir", "x", "-fuse-dir", "./x/"], error(same));
}

#[test]
fn an_unknown_flag_shows_the_usage() {
    let output = litefs(&["mount", "-frob"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(output.stderr, b"ERROR: flag provided but not defined: -frob\n");
    assert!(output.stdout.starts_with(b"Mounts the file system"));
}

#[test]
fn a_file_is_checked_without_a_mount() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("litefs.yml");
    let text_path = path.to_str().unwrap().to_owned();
    let check_file = |text: &str, expected: Expected<'_>| {
        fs::write(&path, text).unwrap();
        check(&["config", "check", "-config", &text_path], expected);
    };
    let stdout = format!("{text_path}: ok\n");
    let lease = "lease: {type: static, hostname: \"${HOST_NAME:-a}\"}\n";
    check_file(lease, Expected { code: 0, stdout: &stdout, stderr: "" });
    let stderr = format!("ERROR: {text_path}:1: unknown key \"leese\", expected one of: ");
    fs::write(&path, "leese: {}\n").unwrap();
    let output = litefs(&["config", "check", "-config", &text_path]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with(&stderr));
    let same = "fuse: {dir: /a}\ndata: {dir: /a}\n";
    let text = "fuse.dir: fuse directory and data directory cannot be the same path";
    let stderr = format!("ERROR: {text_path}:1: {text}\n");
    check_file(same, Expected { code: 2, stdout: "", stderr: &stderr });
    let stderr = "ERROR: litefs config frob: unknown command\n";
    check(&["config", "frob"], Expected { code: 2, stdout: "", stderr });
    let stderr = "ERROR: config file not found\n";
    check(&["config", "check"], Expected { code: 2, stdout: "", stderr });
}
