//! `exec`: a string, or a list of `cmd` and `if-candidate`; a command line to words.
//!
//! Words are separated by blanks, tabs and newlines. `'...'` is literal, `"..."` keeps blanks, and
//! a backslash takes the next character as it is, except between single quotes. There is no shell:
//! no variables, no patterns. What a shell would treat as an operator is an error when unquoted,
//! because a command that silently ends there is worse.

use std::fmt;
use std::iter::Peekable;
use std::str::Chars;

use serde::de::{self, Deserializer, SeqAccess, Visitor};

use super::{Deserialize, KeyIn, MapAccess, Nullable, Value, section};

/// One command to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Program and arguments; never empty.
    pub words: Vec<String>,
    /// Skip it on a node that is not a candidate.
    pub if_candidate: bool,
}

impl fmt::Display for Command {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.words.join(" "))
    }
}

/// Why a command line has no words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WordsError {
    /// A quote is not closed.
    #[error("a quote is not closed")]
    UnclosedQuote,
    /// A shell operator.
    #[error("{0:?} is a shell operator and there is no shell: quote it, or run sh -c '...'")]
    Operator(char),
    /// Blanks only.
    #[error("the command is empty")]
    Empty,
}

/// The words of a command line.
///
/// # Errors
/// An unclosed quote or an unquoted shell operator. An empty line has no words.
pub fn split_words(line: &str) -> Result<Vec<String>, WordsError> {
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    while let Some(&c) = chars.peek() {
        if is_blank(c) {
            chars.next();
        } else {
            words.push(next_word(&mut chars)?);
        }
    }
    Ok(words)
}

fn next_word(chars: &mut Peekable<Chars<'_>>) -> Result<String, WordsError> {
    let mut word = String::new();
    while let Some(c) = chars.next_if(|c| !is_blank(*c)) {
        match c {
            '\'' => word.push_str(&quoted(chars, '\'')?),
            '"' => word.push_str(&quoted(chars, '"')?),
            '\\' => word.extend(chars.next()),
            ';' | '&' | '|' | '<' | '>' => return Err(WordsError::Operator(c)),
            '(' if !word.ends_with('$') => return Err(WordsError::Operator(c)),
            c => word.push(c),
        }
    }
    Ok(word)
}

/// The text up to the closing quote.
fn quoted(chars: &mut Peekable<Chars<'_>>, quote: char) -> Result<String, WordsError> {
    let mut text = String::new();
    while let Some(c) = chars.next() {
        match c {
            c if c == quote => return Ok(text),
            '\\' if quote == '"' => text.push(chars.next().ok_or(WordsError::UnclosedQuote)?),
            c => text.push(c),
        }
    }
    Err(WordsError::UnclosedQuote)
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

section! {
    /// An entry of the list as it stands in the file.
    Entry {
        /// The command line; required.
        "cmd" => cmd: Words = Words::default();
        /// Skip it on a node that is not a candidate.
        "if-candidate" => if_candidate: bool = false;
    }
}

/// A command line, split while the parser still knows its place in the file.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Words(Vec<String>);

impl Value for Words {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let line = String::deserialize(deserializer)?;
        split_words(&line).map(Words).map_err(cannot_parse)
    }
}

impl Value for Vec<Command> {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ExecVisitor)
    }
}

struct ExecVisitor;

impl<'de> Visitor<'de> for ExecVisitor {
    type Value = Vec<Command>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a command line or a list of entries with the key cmd")
    }

    fn visit_str<E: de::Error>(self, line: &str) -> Result<Vec<Command>, E> {
        let words = split_words(line).map_err(cannot_parse)?;
        let command = Command { words, if_candidate: false };
        Ok(if command.words.is_empty() { Vec::new() } else { vec![command] })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Command>, A::Error> {
        let mut commands = Vec::new();
        while let Some(Entry { cmd: Words(words), if_candidate }) = list.next_element()? {
            if words.is_empty() {
                return Err(cannot_parse(WordsError::Empty));
            }
            commands.push(Command { words, if_candidate });
        }
        Ok(commands)
    }
}

fn cannot_parse<E: de::Error>(error: WordsError) -> E {
    E::custom(format_args!("cannot parse exec command: {error}"))
}

#[cfg(test)]
mod tests {
    use super::{WordsError, split_words};

    #[track_caller]
    fn check(line: &str, expected: &[&str]) {
        assert_eq!(split_words(line).unwrap(), expected, "{line:?}");
    }

    #[test]
    fn words_are_split_as_in_a_shell() {
        check("", &[]);
        check(" myapp\t-addr :8080\n", &["myapp", "-addr", ":8080"]);
        check(r#"sh -c 'a; b "c" \d'"#, &["sh", "-c", r#"a; b "c" \d"#]);
        check(r#""a b"c '' \;\ x "q\"q""#, &["a bc", "", "; x", "q\"q"]);
        check("echo $(x) $HOME *", &["echo", "$(x)", "$HOME", "*"]);
    }

    #[test]
    fn what_needs_a_shell_is_refused() {
        for (line, operator) in
            [("a && b", '&'), ("a|b", '|'), ("a;", ';'), ("a >f", '>'), ("(a)", '(')]
        {
            assert_eq!(split_words(line), Err(WordsError::Operator(operator)));
        }
        for line in ["'a", "\"a", "\"a\\"] {
            assert_eq!(split_words(line), Err(WordsError::UnclosedQuote));
        }
    }
}
