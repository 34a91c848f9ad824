//! Variables in the text of the configuration file.
//!
//! ```text
//! $NAME  ${NAME}                    the value; nothing where it is unset
//! ${NAME:-text}                     the value; the text where it is unset or empty
//! ${NAME == 'text'}  != "text"      true or false; also ${NAME == OTHER}
//! $$                                a dollar sign
//! ```
//!
//! The whole text counts, comments and quoted strings too. `$$` and `:-` differ from LiteFS, which
//! drops both. A `$` before another character of `*#@!?-` or a digit vanishes with it, `${}` and
//! an unclosed `${` vanish, and a `$` before anything else stays.

/// Looks up a variable; `None` where it is unset.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The text with every variable replaced.
pub fn expand(text: &str, lookup: Lookup<'_>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = replace_one(&rest[at + 1..], &mut out, lookup);
    }
    out.push_str(rest);
    out
}

/// Handles what follows a `$`; returns the text after it.
fn replace_one<'t>(rest: &'t str, out: &mut String, lookup: Lookup<'_>) -> &'t str {
    let Some(first) = rest.chars().next() else {
        out.push('$');
        return rest;
    };
    match first {
        '$' => {
            out.push('$');
            &rest[1..]
        }
        '{' => replace_braced(&rest[1..], out, lookup),
        '*' | '#' | '@' | '!' | '?' | '-' | '0'..='9' => {
            out.push_str(&lookup(&rest[..1]).unwrap_or_default());
            &rest[1..]
        }
        first if is_word(first) => {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            out.push_str(&lookup(&rest[..end]).unwrap_or_default());
            &rest[end..]
        }
        _ => {
            out.push('$');
            rest
        }
    }
}

fn replace_braced<'t>(rest: &'t str, out: &mut String, lookup: Lookup<'_>) -> &'t str {
    let Some((inside, after)) = rest.split_once('}') else { return rest };
    out.push_str(&evaluate(inside.trim(), lookup));
    after
}

/// What stands between the braces.
fn evaluate(expression: &str, lookup: Lookup<'_>) -> String {
    let name_len = expression.find(|c| !is_word(c)).unwrap_or(expression.len());
    let (name, operation) = expression.split_at(name_len);
    let value = || lookup(name).unwrap_or_default();
    if name.is_empty() {
        return lookup(expression).unwrap_or_default();
    }
    if let Some(default) = operation.strip_prefix(":-") {
        return Some(value()).filter(|value| !value.is_empty()).unwrap_or(default.to_owned());
    }
    let operation = operation.trim_start();
    for (operator, wanted) in [("==", true), ("!=", false)] {
        let operand = operation.strip_prefix(operator).and_then(|text| operand(text, lookup));
        if let Some(operand) = operand {
            return ((value() == operand) == wanted).to_string();
        }
    }
    lookup(expression).unwrap_or_default()
}

/// The right side of a comparison: a quoted text, or another variable's value.
fn operand(text: &str, lookup: Lookup<'_>) -> Option<String> {
    let text = text.trim();
    for quote in ['\'', '"'] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|text| text.strip_suffix(quote)) {
            return Some(inner.to_owned());
        }
    }
    let is_name = !text.is_empty() && text.chars().all(is_word);
    is_name.then(|| lookup(text).unwrap_or_default())
}

fn is_word(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::expand;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let lookup = |name: &str| match name {
            "A" | "_a1" => Some("x".to_owned()),
            "B" => Some("y".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        assert_eq!(expand(text, &lookup), expected, "{text:?}");
    }

    #[test]
    fn variables_are_replaced_everywhere() {
        check("dir: $A/$B", "dir: x/y");
        check("'${A}b' # $A", "'xb' # x");
        check("$_a1-$AB-${ A }-${NONE}.", "x--x-.");
        check("é$A é", "éx é");
    }

    #[test]
    fn comparisons_become_booleans() {
        check("${A == 'x'} ${A=='y'} ${A != \"x\"} ${A != \"\"}", "true false false true");
        check("${A == B} ${ A == A } ${NONE == EMPTY}", "false true true");
        check("${A == } ${A = 'x'} ${A < B}", "  ");
    }

    #[test]
    fn a_default_stands_in_for_unset_and_empty() {
        check("${A:-d} ${NONE:-d} ${EMPTY:-d} ${NONE:-} ${NONE:-a b}", "x d d  a b");
    }

    #[test]
    fn a_doubled_dollar_is_one() {
        check("p$$word $$A $${A}", "p$word $A ${A}");
    }

    #[test]
    fn odd_dollars_vanish_or_stay_as_in_litefs() {
        check("a$*b$1c$-d", "abcd");
        check("${}-${A", "-A");
        check("cost: 5$ $/ $é $", "cost: 5$ $/ $é $");
    }
}
