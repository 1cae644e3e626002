//! Owns how a configuration is refused. The operator is always at fault, and a retry never helps.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why the server does not start. No text in here quotes a secret.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },

    /// Keeps the parser's message but not its error, which prints the line at fault and any password in it.
    #[error("{}, line {line}, is not TOML: {message}", path.display())]
    NotToml { path: PathBuf, line: usize, message: String },

    /// Every fault there is, one per line.
    #[error("{}", lines(.0))]
    Invalid(Vec<Fault>),
}

/// One value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// `section.key`, or the line of a file.
    pub key: String,
    /// The variable or file it came from.
    pub origin: String,
    /// What is wrong with it and what was expected.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (from {}): {}", self.key, self.origin, self.problem)
    }
}

impl ConfigError {
    pub(super) fn unreadable(path: &Path, source: io::Error) -> Self {
        Self::Unreadable { path: path.into(), source }
    }

    pub(super) fn not_toml(path: &Path, text: &str, error: &toml::de::Error) -> Self {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        Self::NotToml { path: path.into(), line: before.matches('\n').count() + 1, message: error.message().replace('\n', ", ") }
    }
}

fn lines(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("\n")
}
