//! Flags in Go's syntax, which scripts written for LiteFS use.
//!
//! ```text
//! -name value   -name=value   --name ...     a flag with a value
//! -name   -name=false                        a switch
//! ```
//!
//! Reading stops at the first argument that is no flag. What follows the first `--` is a command
//! for `mount`, and never read.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What a command takes.
pub struct Spec {
    /// Its name.
    pub name: &'static str,
    /// Its arguments, as a usage line shows them.
    pub arguments: &'static str,
    /// What it does.
    pub about: &'static str,
    /// Its flags.
    pub flags: &'static [Flag],
}

/// A flag.
pub struct Flag {
    /// Without dashes.
    pub name: &'static str,
    /// What follows it.
    pub kind: Kind,
    /// What it means.
    pub about: &'static str,
}

/// What follows a flag.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing, or `=true` or `=false`.
    Switch,
    /// A value, called so in the usage text.
    Value(&'static str),
}

/// What is wrong with the arguments.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// `-h` or `-help`: nothing is wrong.
    #[error("help requested")]
    Help,
    /// No such flag.
    #[error("flag provided but not defined: -{0}")]
    Undefined(String),
    /// A flag at the end that needs a value.
    #[error("flag needs an argument: -{0}")]
    NeedsValue(String),
    /// A switch with something else than true or false.
    #[error("invalid boolean value {value:?} for -{name}")]
    NoBoolean {
        /// The switch.
        name: String,
        /// What follows it.
        value: String,
    },
    /// Dashes without a name.
    #[error("bad flag syntax: {0}")]
    Syntax(String),
}

/// The arguments of a command, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Flags {
    values: BTreeMap<&'static str, String>,
    /// What stands after the flags.
    pub arguments: Vec<String>,
    /// What stands after `--`; `None` without one.
    pub command: Option<Vec<String>>,
}

impl Flags {
    /// Reads arguments.
    ///
    /// # Errors
    /// Every [`Error`].
    pub fn parse(spec: &Spec, arguments: &[String]) -> Result<Flags, Error> {
        let mut parts = arguments.splitn(2, |argument| argument == "--");
        let mut rest = parts.next().unwrap_or_default();
        let mut flags = Flags { command: parts.next().map(<[String]>::to_vec), ..Flags::default() };
        while let Some(text) = rest.first().and_then(|argument| flag_text(argument)) {
            rest = flags.read_flag(spec, text, &rest[1..])?;
        }
        flags.arguments = rest.to_vec();
        Ok(flags)
    }

    /// Reads one flag; returns the arguments after it.
    fn read_flag<'a>(
        &mut self,
        spec: &Spec,
        text: &str,
        after: &'a [String],
    ) -> Result<&'a [String], Error> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        if name.is_empty() || name.starts_with('-') {
            return Err(Error::Syntax(format!("-{text}")));
        }
        let Some(flag) = spec.flags.iter().find(|flag| flag.name == name) else {
            let help = name == "h" || name == "help";
            return Err(if help { Error::Help } else { Error::Undefined(name.to_owned()) });
        };
        let (value, after) = match (flag.kind, value) {
            (Kind::Switch, value) => (boolean(name, value.unwrap_or("true"))?, after),
            (Kind::Value(_), Some(value)) => (value.to_owned(), after),
            (Kind::Value(_), None) => {
                let needed = || Error::NeedsValue(name.to_owned());
                let (value, after) = after.split_first().ok_or_else(needed)?;
                (value.clone(), after)
            }
        };
        self.values.insert(flag.name, value);
        Ok(after)
    }

    /// The value of a flag, if it was given.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// The value of a flag, if it is not empty: scripts pass variables that are.
    pub fn given(&self, name: &str) -> Option<&str> {
        self.value(name).filter(|value| !value.is_empty())
    }

    /// Whether a switch is on.
    pub fn is_on(&self, name: &str) -> bool {
        self.value(name) == Some("true")
    }
}

/// The text of a flag without its dashes; `None` for another argument, such as a lone dash.
fn flag_text(argument: &str) -> Option<&str> {
    let text = argument.strip_prefix('-').filter(|text| !text.is_empty())?;
    Some(text.strip_prefix('-').unwrap_or(text))
}

/// A boolean in the spellings that Go takes.
fn boolean(name: &str, value: &str) -> Result<String, Error> {
    let on = match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
        "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
        _ => return Err(Error::NoBoolean { name: name.to_owned(), value: value.to_owned() }),
    };
    Ok(on.to_string())
}

impl Spec {
    /// The usage text.
    pub fn usage(&self) -> String {
        let mut text = format!("{}\n\nUsage:\n\n  litefs {}", self.about, self.name);
        if !self.flags.is_empty() {
            text.push_str(" [flags]");
        }
        if !self.arguments.is_empty() {
            text.push(' ');
            text.push_str(self.arguments);
        }
        let shown: Vec<_> = self.flags.iter().map(Flag::shown).collect();
        let width = shown.iter().map(String::len).max().unwrap_or(0);
        for (index, (flag, shown)) in self.flags.iter().zip(&shown).enumerate() {
            text.push_str(if index == 0 { "\n\nFlags:\n\n" } else { "\n" });
            // Writing to a String cannot fail.
            let _ = write!(text, "  {shown:width$}  {}", flag.about);
        }
        text
    }
}

impl Flag {
    fn shown(&self) -> String {
        match self.kind {
            Kind::Switch => format!("-{}", self.name),
            Kind::Value(value) => format!("-{} {value}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: Spec = Spec {
        name: "x",
        arguments: "PATH",
        about: "x does x.",
        flags: &[
            Flag { name: "config", kind: Kind::Value("PATH"), about: "a file" },
            Flag { name: "fuse.debug", kind: Kind::Switch, about: "a switch" },
        ],
    };

    fn parse(line: &str) -> Result<Flags, Error> {
        let arguments: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        Flags::parse(&SPEC, &arguments)
    }

    #[test]
    fn one_dash_and_two_mean_the_same() {
        for line in ["-config a.yml -fuse.debug", "--config=a.yml --fuse.debug=true"] {
            let flags = parse(line).unwrap();
            assert_eq!(flags.value("config"), Some("a.yml"));
            assert!(flags.is_on("fuse.debug"));
        }
        assert!(!parse("-fuse.debug=false").unwrap().is_on("fuse.debug"));
        assert!(!parse("").unwrap().is_on("fuse.debug"));
    }

    #[test]
    fn an_empty_value_is_none_that_is_given() {
        for line in ["", "-config="] {
            assert_eq!(parse(line).unwrap().given("config"), None);
        }
        assert_eq!(parse("-config=a").unwrap().given("config"), Some("a"));
    }

    #[test]
    fn flags_end_at_the_first_other_argument() {
        let flags = parse("-fuse.debug a -config b").unwrap();
        assert_eq!(flags.arguments, ["a", "-config", "b"]);
        assert_eq!(parse("- -config").unwrap().arguments, ["-", "-config"]);
    }

    #[test]
    fn a_command_is_taken_as_it_is() {
        let flags = parse("-fuse.debug -- sh -config -- x").unwrap();
        assert_eq!(flags.command.unwrap(), ["sh", "-config", "--", "x"]);
        assert_eq!(parse("--").unwrap().command, Some(Vec::new()));
        assert_eq!(parse("a").unwrap().command, None);
        // A value that looks like the separator is the separator.
        assert_eq!(parse("-config -- a"), Err(Error::NeedsValue("config".to_owned())));
    }

    #[track_caller]
    fn refused(line: &str, message: &str) {
        assert_eq!(parse(line).unwrap_err().to_string(), message);
    }

    #[test]
    fn mistakes_are_named() {
        refused("-x", "flag provided but not defined: -x");
        refused("--x=1", "flag provided but not defined: -x");
        refused("-config", "flag needs an argument: -config");
        refused("-fuse.debug=maybe", "invalid boolean value \"maybe\" for -fuse.debug");
        refused("-=a", "bad flag syntax: -=a");
        refused("-h", "help requested");
        refused("--help", "help requested");
    }

    #[test]
    fn the_usage_text_lines_up() {
        let text = "x does x.\n\nUsage:\n\n  litefs x [flags] PATH\n\nFlags:\n\n  \
                    -config PATH  a file\n  -fuse.debug   a switch";
        assert_eq!(SPEC.usage(), text);
    }
}
