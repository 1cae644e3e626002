//! Owns the choice of database engine, made by the URL's scheme.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::secret::Secret;

const EXPECTED: &str = "sqlite:PATH, postgres://… or postgresql://…";

/// Which engine holds the data, and where. `Debug` prints [`DatabaseUrl::redacted`].
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// A file, made when it is missing.
    Sqlite(PathBuf),
    /// The whole URL, as tokio-postgres takes it.
    Postgres(Secret),
}

impl DatabaseUrl {
    /// The URL with `***` for its password, fit for a log.
    pub fn redacted(&self) -> String {
        match self {
            Self::Sqlite(path) => format!("sqlite:{}", path.display()),
            Self::Postgres(url) => redact(url.expose()),
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

/// The error says what was expected and quotes nothing but the scheme, since the rest may hold a password.
impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        match url.split_once(':') {
            // `//` would make a relative path absolute, and the others are SQLite's own names for what is not a file.
            Some(("sqlite", path)) if path.starts_with("//") || path == ":memory:" || path.starts_with("file:") => {
                Err("names no plain file, expected sqlite:PATH".into())
            }
            Some(("sqlite", path)) if !path.is_empty() => Ok(Self::Sqlite(path.into())),
            Some(("postgres" | "postgresql", rest)) if rest.starts_with("//") && rest.len() > 2 => {
                Ok(Self::Postgres(Secret::new(without_schema(url))))
            }
            Some((scheme, rest)) if rest.starts_with("//") && scheme.chars().all(|c| c.is_ascii_alphanumeric()) => {
                Err(format!("cannot use the scheme {scheme:?}, expected {EXPECTED}"))
            }
            Some(_) | None => Err(format!("is not a database's URL, expected {EXPECTED}")),
        }
    }
}

/// Drops the `schema` parameter, which Prisma (the original's database layer) writes and tokio-postgres refuses.
fn without_schema(url: &str) -> String {
    let (base, parameters) = split_query(url);
    let kept: Vec<_> = parameters.split('&').filter(|parameter| !parameter.starts_with("schema=")).collect();
    join_query(base, &kept.join("&"))
}

/// Hides up to the *last* `@` before the query, so that a password with an unescaped `@` is hidden whole.
fn redact(url: &str) -> String {
    let (base, parameters) = split_query(url);
    let (scheme, rest) = base.split_once("://").unwrap_or_default();
    let base = match rest.rsplit_once('@').map(|(credentials, address)| (credentials.split_once([':', '@']), address)) {
        Some((Some((user, _password)), address)) => format!("{scheme}://{user}:***@{address}"),
        Some((None, _)) | None => base.to_owned(),
    };
    let redacted = parameters.split('&').map(|parameter| match parameter.split_once('=') {
        Some((name, value)) if name.contains("password") || value.contains('@') => format!("{name}=***"),
        Some(_) => parameter.to_owned(),
        None => String::new(),
    });
    join_query(&base, &redacted.collect::<Vec<_>>().join("&"))
}

/// Splits where tokio-postgres does: the query begins at the first `?` behind the first `@`.
fn split_query(url: &str) -> (&str, &str) {
    let (credentials, rest) = url.split_at(url.find('@').unwrap_or(0));
    match rest.split_once('?') {
        Some((address, query)) => (url.get(..credentials.len() + address.len()).unwrap_or(url), query),
        None => (url, ""),
    }
}

fn join_query(base: &str, query: &str) -> String {
    if query.is_empty() { base.to_owned() } else { format!("{base}?{query}") }
}
