//! Usage texts, unknown commands and bad flags.

use super::{Expected, check, litefs};

#[test]
fn usage_goes_to_stdout_with_code_2() {
    for arguments in [&[][..], &["help"], &["-h"], &["--help"], &["-config", "x"]] {
        let output = litefs(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.starts_with(b"litefs replicates SQLite databases"));
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn help_of_a_command_goes_to_stdout_with_code_2() {
    for command in ["export", "import", "run", "status", "version"] {
        for flag in ["-h", "--help"] {
            let output = litefs(&[command, flag]);
            let stdout = String::from_utf8(output.stdout).unwrap();
            assert_eq!(output.status.code(), Some(2));
            assert!(stdout.contains(&format!("\n  litefs {command}")), "{stdout}");
            assert!(output.stderr.is_empty());
        }
    }
}

#[test]
fn the_reference_has_every_flag() {
    let page = include_str!("../../docs/reference.md");
    let commands =
        ["mount", "run", "status", "promote", "export", "import", "config check", "version"];
    for command in commands {
        let arguments: Vec<&str> = command.split(' ').chain(["-h"]).collect();
        let help = String::from_utf8(litefs(&arguments).stdout).unwrap();
        let flags = help.lines().filter_map(|line| line.strip_prefix("  -")?.split(' ').next());
        for flag in flags {
            let stands =
                [format!("`-{flag}`"), format!("`-{flag} "), format!("litefs mount -{flag}`")];
            assert!(stands.iter().any(|text| page.contains(text)), "{command} -{flag}");
        }
        assert!(page.contains(&format!("`litefs {command}")), "{command}");
    }
}

#[test]
fn an_unknown_command_has_code_1() {
    let stderr = "ERROR: litefs frobnicate: unknown command\n";
    check(&["frobnicate"], Expected { code: 1, stdout: "", stderr });
}

#[test]
fn an_unknown_flag_has_code_2() {
    let output = litefs(&["export", "--frob"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(output.stderr, b"ERROR: flag provided but not defined: -frob\n");
    assert!(output.stdout.starts_with(b"Copies a database"));
}

#[test]
fn version_is_one_line() {
    let stdout = concat!("LiteFS v", env!("CARGO_PKG_VERSION"));
    let output = litefs(&["version"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with(stdout) && text.lines().count() == 1, "{text}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn export_and_import_take_one_path_and_a_name() {
    for command in ["export", "import"] {
        let error = |stderr| Expected { code: 2, stdout: "", stderr };
        check(&[command, "-name", "db", "a", "b"], error("ERROR: too many arguments\n"));
        check(&[command, "/tmp/x"], error("ERROR: -name required\n"));
        assert_eq!(litefs(&[command]).status.code(), Some(2));
    }
    let error = |stderr| Expected { code: 2, stdout: "", stderr };
    check(&["status", "x"], error("ERROR: too many arguments\n"));
}
