//! Owns how one value is read: a function per kind of key, from what was written to a typed value or what is wrong with it.
//!
//! A problem reads on behind the key ("is out of range, expected …"). It quotes plain values, but neither URLs nor
//! values of the wrong type, since those may hold a secret.

use std::fmt;
use std::net::Ipv6Addr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use toml::Value;

use super::MinFree;

const ORIGINS: &str = "origins as browsers send them: scheme://host or scheme://host:port in lower case, without path, \
                       user, default port or \"*\"";

/// A value as it was written.
pub(super) enum Raw {
    /// Text without a type: it is read as whatever the key wants.
    Variable(String),
    File(Value),
}

impl fmt::Display for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(text) => write!(f, "{text:?}"),
            Self::File(value) => value.fmt(f),
        }
    }
}

impl Raw {
    fn text(&self, expected: &str) -> Result<&str, String> {
        match self {
            Self::Variable(text) => Ok(text),
            Self::File(value) => value.as_str().ok_or_else(|| self.of_wrong_type(expected)),
        }
    }

    fn number(&self, expected: &str) -> Result<String, String> {
        match self {
            Self::Variable(text) => Ok(text.clone()),
            Self::File(Value::Integer(number)) => Ok(number.to_string()),
            Self::File(Value::Float(number)) => Ok(number.to_string()),
            Self::File(_) => Err(self.of_wrong_type(expected)),
        }
    }

    pub(super) fn of_wrong_type(&self, expected: &str) -> String {
        match self {
            Self::Variable(_) => format!("cannot come from the environment, expected {expected}"),
            Self::File(value) => format!("is of type {}, expected {expected}", value.type_str()),
        }
    }

    fn unreadable(&self, expected: &str) -> String {
        format!("{self} cannot be read, expected {expected}")
    }

    fn out_of_range(&self, expected: &str) -> String {
        format!("{self} is out of range, expected {expected}")
    }
}

pub(super) fn text(raw: &Raw) -> Result<String, String> {
    match raw.text("text")? {
        "" => Err("is empty, expected text".into()),
        text => Ok(text.to_owned()),
    }
}

pub(super) fn path(raw: &Raw) -> Result<PathBuf, String> {
    text(raw).map(PathBuf::from)
}

/// A variable may also say 1, 0, yes or no, in any case.
pub(super) fn flag(raw: &Raw) -> Result<bool, String> {
    const EXPECTED: &str = "true or false";
    match raw {
        Raw::File(value) => value.as_bool().ok_or_else(|| raw.of_wrong_type(EXPECTED)),
        Raw::Variable(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" => Ok(true),
            "false" | "0" | "no" => Ok(false),
            _ => Err(raw.unreadable(EXPECTED)),
        },
    }
}

pub(super) fn choice<T: Copy, const N: usize>(words: [(&str, T); N]) -> impl Fn(&Raw) -> Result<T, String> {
    move |raw| {
        let expected = words.map(|(word, _)| format!("{word:?}")).join(" or ");
        let text = raw.text(&expected)?;
        let chosen = words.iter().find(|(word, _)| *word == text);
        chosen.map(|(_, choice)| *choice).ok_or_else(|| raw.unreadable(&expected))
    }
}

pub(super) fn whole<T>(range: RangeInclusive<T>) -> impl Fn(&Raw) -> Result<T, String>
where
    T: TryFrom<i64> + PartialOrd + fmt::Display,
{
    move |raw| {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        let number: i64 = raw.number(&expected)?.parse().map_err(|_| raw.unreadable(&expected))?;
        T::try_from(number).ok().filter(|number| range.contains(number)).ok_or_else(|| raw.out_of_range(&expected))
    }
}

pub(super) fn real(range: RangeInclusive<f64>) -> impl Fn(&Raw) -> Result<f64, String> {
    move |raw| {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        let number = raw.number(&expected)?.parse().map_err(|_| raw.unreadable(&expected))?;
        Some(number).filter(|number| range.contains(number)).ok_or_else(|| raw.out_of_range(&expected))
    }
}

/// The bounds are written as an operator would write them, for the message's sake.
pub(super) fn duration(from: &'static str, to: &'static str) -> impl Fn(&Raw) -> Result<Duration, String> {
    let read = |text: &str| humantime::parse_duration(text).ok();
    measure("a duration", from, to, read)
}

/// In bytes, with bounds as in [`duration`].
pub(super) fn size(from: &'static str, to: &'static str) -> impl Fn(&Raw) -> Result<u64, String> {
    let read = |text: &str| text.parse::<ByteSize>().ok().map(|size| size.as_u64());
    measure("a size", from, to, read)
}

/// A size, or one of the two words that are none.
pub(super) fn min_free(raw: &Raw) -> Result<MinFree, String> {
    const EXPECTED: &str = "a size from 1B to 1PiB, with its unit and in quotes, or \"auto\", or \"0\"";
    match raw.text(EXPECTED)? {
        "auto" => Ok(MinFree::Auto),
        "0" => Ok(MinFree::Bytes(0)),
        text => {
            let size = text.parse::<ByteSize>().ok().filter(|_| !text.ends_with(|c: char| c.is_ascii_digit())).map(|size| size.as_u64());
            let bytes = size.ok_or_else(|| raw.unreadable(EXPECTED))?;
            Some(bytes).filter(|bytes| (1..=1 << 50).contains(bytes)).map(MinFree::Bytes).ok_or_else(|| raw.out_of_range(EXPECTED))
        }
    }
}

fn measure<T: PartialOrd>(what: &str, from: &str, to: &str, read: impl Fn(&str) -> Option<T>) -> impl Fn(&Raw) -> Result<T, String> {
    let expected = format!("{what} from {from} to {to}, with its unit and in quotes");
    let bound = |text| read(text).expect("bounds are written in the key's own form");
    let range = bound(from)..=bound(to);
    move |raw| {
        let measure = read(raw.text(&expected)?).ok_or_else(|| raw.unreadable(&expected))?;
        Some(measure).filter(|measure| range.contains(measure)).ok_or_else(|| raw.out_of_range(&expected))
    }
}

pub(super) fn url(schemes: &[&str]) -> impl Fn(&Raw) -> Result<String, String> {
    move |raw| {
        let url = text(raw)?;
        check_url(&url, schemes)?;
        Ok(url)
    }
}

/// A URL to which paths are appended: neither a query nor a trailing slash.
pub(super) fn base_url(schemes: &[&str]) -> impl Fn(&Raw) -> Result<String, String> {
    move |raw| to_base(&text(raw)?, schemes)
}

/// LiveKit's address in any of the forms its own tools take; a bare host means https.
pub(super) fn livekit_url(raw: &Raw) -> Result<String, String> {
    let mut url = text(raw)?;
    if !url.contains("://") {
        url.insert_str(0, "https://");
    }
    to_base(&url, &["http", "https", "ws", "wss"])
}

/// A list of exact origins, which no variable can hold.
pub(super) fn origins(raw: &Raw) -> Result<Vec<String>, String> {
    let Raw::File(Value::Array(list)) = raw else { return Err(raw.of_wrong_type("a list in the file")) };
    list.iter()
        .map(|item| match item.as_str() {
            Some(origin) if is_origin(origin) => Ok(origin.to_owned()),
            Some(_) | None => Err(format!("{item} is not an exact origin, expected {ORIGINS}")),
        })
        .collect()
}

fn to_base(url: &str, schemes: &[&str]) -> Result<String, String> {
    check_url(url, schemes)?;
    if url.contains(['?', '#']) {
        return Err("has a query, expected a URL to which paths can be appended".into());
    }
    Ok(url.trim_end_matches('/').to_owned())
}

fn check_url(url: &str, schemes: &[&str]) -> Result<(), String> {
    let authority = url
        .split_once("://")
        .filter(|(scheme, _)| schemes.contains(scheme))
        .and_then(|(_, rest)| rest.split(['/', '?', '#']).next())
        .and_then(host_and_port);
    let printable = url.chars().all(|c| !c.is_control() && !c.is_whitespace());
    if authority.is_some() && printable {
        return Ok(());
    }
    let starts = schemes.iter().map(|scheme| format!("{scheme}://")).collect::<Vec<_>>().join(" or ");
    Err(format!("is not a usable URL, expected {starts} and a host, without user or white space"))
}

fn is_origin(origin: &str) -> bool {
    let Some((scheme, authority)) = origin.split_once("://") else { return false };
    let scheme_is_plain =
        scheme.starts_with(|c: char| c.is_ascii_lowercase()) && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    let Some((_, port)) = host_and_port(authority) else { return false };
    let port_is_default = matches!((scheme, port), ("http", Some(80)) | ("https", Some(443)));
    scheme_is_plain && !port_is_default && !origin.contains(|c: char| c.is_ascii_uppercase())
}

/// Splits `host`, `host:port` or `[v6]:port`; `None` for anything else, above all for one with a user.
fn host_and_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !authority.ends_with(']') => (host, Some(port.parse().ok()?)),
        Some(_) | None => (authority, None),
    };
    let host_is_valid = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)),
    };
    host_is_valid.then_some((host, port))
}
