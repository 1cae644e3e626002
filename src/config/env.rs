//! Owns the variables the server was started with. Nothing else reads the environment, and nothing reads it twice.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::path::Path;

use super::error::{ConfigError, Fault};

/// The process's environment over what `.env` says. An empty variable counts as absent, so one in the environment
/// switches off its namesake in `.env`.
#[derive(Clone, Default, PartialEq)]
pub struct Env(BTreeMap<String, String>);

impl Env {
    /// Reads `dotenv`, where that file exists, and the environment. Variables that are not UTF-8 are skipped.
    ///
    /// # Errors
    /// A `.env` file that cannot be read, or all of its lines that are not `NAME=value`.
    pub fn load(dotenv: Option<&Path>) -> Result<Self, ConfigError> {
        Self::layered(dotenv, std::env::vars_os())
    }

    /// An environment of exactly these variables.
    pub fn from_pairs<N: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (N, V)>) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }

    /// The variable's value, unless it is absent or empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The names of all variables that are not empty.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|(_, value)| !value.is_empty()).map(|(name, _)| name.as_str())
    }

    pub(super) fn layered(dotenv: Option<&Path>, process: impl Iterator<Item = (OsString, OsString)>) -> Result<Self, ConfigError> {
        let mut variables = dotenv.map_or(Ok(BTreeMap::new()), read_dotenv)?;
        variables.extend(process.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))));
        Ok(Self(variables))
    }
}

/// Names only: any variable may hold a secret.
impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The last of several lines with one name wins, as in the original's dotenv. A fault tells the line's number instead
/// of quoting it, as dotenvy's own message would.
fn read_dotenv(path: &Path) -> Result<BTreeMap<String, String>, ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(ConfigError::unreadable(path, error)),
    };
    let text = text.trim_start_matches('\u{feff}');
    let (mut variables, mut faults) = (BTreeMap::new(), Vec::new());
    for line in dotenvy::from_read_iter(text.as_bytes()) {
        match line {
            Ok((name, value)) => {
                variables.insert(name, value);
            }
            Err(error) => faults.push(Fault {
                key: line_number(text, &error).map_or_else(|| "a line".into(), |number| format!("line {number}")),
                origin: path.display().to_string(),
                problem: "cannot be read, expected NAME=value, the value in quotes if it holds white space".into(),
            }),
        }
    }
    if faults.is_empty() { Ok(variables) } else { Err(ConfigError::Invalid(faults)) }
}

fn line_number(text: &str, error: &dotenvy::Error) -> Option<usize> {
    let dotenvy::Error::LineParse(line, _) = error else { return None };
    let (before, _) = text.split_once(line.trim())?;
    Some(before.matches('\n').count() + 1)
}
