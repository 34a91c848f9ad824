//! The environment variables, as the configuration and the child processes see them.

use std::collections::BTreeMap;

/// The variable that is filled in with the machine's name where it is unset or empty.
const HOSTNAME: &str = "HOSTNAME";

/// The machine's own name.
pub fn machine_name() -> std::io::Result<String> {
    Ok(nix::unistd::gethostname()?.to_string_lossy().into_owned())
}

/// A copy of the environment. Values that are not UTF-8 are left out.
#[derive(Debug, Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// The process's own environment, with `HOSTNAME` set to `hostname` where it is unset or empty.
    pub fn of_process(hostname: &str) -> Environment {
        let variables = std::env::vars_os();
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Environment(variables.filter_map(text).collect()).with_hostname(hostname)
    }

    fn with_hostname(mut self, hostname: &str) -> Environment {
        let known = self.0.get(HOSTNAME).is_some_and(|value| !value.is_empty());
        if !known {
            self.0.insert(HOSTNAME.to_owned(), hostname.to_owned());
        }
        self
    }

    /// The value of a variable; `None` where it is unset.
    pub fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).cloned()
    }

    /// What `HOSTNAME` says: what the configuration and the application see, whatever the machine is called.
    pub fn hostname(&self) -> String {
        self.get(HOSTNAME).unwrap_or_default()
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(variables: [(&str, &str); N]) -> Environment {
        Environment(variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into())
    }
}

#[cfg(test)]
mod tests {
    use super::Environment;

    #[test]
    fn an_empty_hostname_is_filled_in() {
        assert_eq!(Environment::from([("HOSTNAME", "")]).with_hostname("m").hostname(), "m");
        assert_eq!(Environment::from([]).with_hostname("m").hostname(), "m");
        assert_eq!(Environment::from([("HOSTNAME", "a")]).with_hostname("m").hostname(), "a");
    }
}
