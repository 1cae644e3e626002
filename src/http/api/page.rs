//! Lists: `{"items": […], "nextCursor": …}` with an opaque keyset cursor.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{NaiveDateTime, SecondsFormat};
use serde::{Deserialize, Serialize};

use crate::db::rows::Page;
use crate::http::error::{ApiError, ErrorCode};

const DEFAULT_LIMIT: u32 = 50;
const MAX_LIMIT: u32 = 200;

/// `limit` and `cursor` of a list's query.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PageQuery {
    pub limit: Option<String>,
    pub cursor: Option<String>,
}

/// One page of a list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listed<T> {
    pub items: Vec<T>,
    /// Asks for the next page; null on the last.
    pub next_cursor: Option<String>,
}

/// What a cursor says: the list it is of, the sort time and the id of the last row seen. The time is exact: SQLite keeps nanoseconds.
#[derive(Serialize, Deserialize)]
struct Cursor(String, NaiveDateTime, String);

impl PageQuery {
    /// The rows to ask the store for: one more than the page, which tells whether there is a next.
    ///
    /// # Errors
    /// 400 for a limit out of range, or a cursor that is not of this list.
    pub fn page(&self, list: &str) -> Result<Page, ApiError> {
        let limit = self.limit()?;
        let after = self.cursor.as_deref().filter(|cursor| !cursor.is_empty()).map(|cursor| decode(cursor, list)).transpose()?;
        Ok(Page { limit: limit + 1, after })
    }

    fn limit(&self) -> Result<u32, ApiError> {
        let Some(limit) = self.limit.as_deref().filter(|limit| !limit.is_empty()) else { return Ok(DEFAULT_LIMIT) };
        let limit = limit.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
        limit.ok_or_else(|| ApiError::new(ErrorCode::InvalidRequest, format!("limit must be a number from 1 to {MAX_LIMIT}")))
    }

    /// Cuts the rows to the page. `key` gives a row's sort time and id.
    ///
    /// # Errors
    /// 400 for a limit out of range.
    pub fn cut<R>(&self, list: &str, rows: &mut Vec<R>, key: impl Fn(&R) -> (NaiveDateTime, String)) -> Result<Option<String>, ApiError> {
        let limit = usize::try_from(self.limit()?).unwrap_or(usize::MAX);
        if rows.len() <= limit {
            return Ok(None);
        }
        rows.truncate(limit);
        Ok(rows.last().map(|row| {
            let (time, id) = key(row);
            let cursor = Cursor(list.to_owned(), time, id);
            URL_SAFE_NO_PAD.encode(serde_json::to_vec(&cursor).expect("a cursor is plain data"))
        }))
    }
}

fn decode(cursor: &str, list: &str) -> Result<(NaiveDateTime, String), ApiError> {
    let bytes = URL_SAFE_NO_PAD.decode(cursor).ok();
    let cursor: Option<Cursor> = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    cursor
        .filter(|cursor| cursor.0 == list)
        .map(|Cursor(_, time, id)| (time, id))
        .ok_or_else(|| ApiError::new(ErrorCode::InvalidRequest, "the cursor is not one of this list"))
}

/// RFC 3339 in UTC with milliseconds.
pub fn timestamp(time: NaiveDateTime) -> String {
    time.and_utc().to_rfc3339_opts(SecondsFormat::Millis, true)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn a_cursor_leads_back_to_its_row_and_to_no_other_list() {
        let query = PageQuery { limit: Some("2".into()), cursor: None };
        let time = DateTime::from_timestamp(1_700_000_000, 123_456_789).expect("a time").naive_utc();
        let mut rows = vec!["a", "b", "c"];
        let cursor = query.cut("sessions", &mut rows, |row| (time, (*row).to_owned())).expect("cut");
        assert_eq!(rows, ["a", "b"]);
        let next = PageQuery { limit: None, cursor };
        assert_eq!(next.page("sessions").expect("a page").after, Some((time, "b".to_owned())));
        next.page("recordings").expect_err("a cursor of another list");
        assert_eq!(query.cut("sessions", &mut vec!["a", "b"], |_| (time, String::new())).expect("cut"), None);
    }

    #[test]
    fn limits_are_checked() {
        for limit in ["0", "201", "-1", "x"] {
            PageQuery { limit: Some(limit.into()), cursor: None }.page("x").expect_err(limit);
        }
        for cursor in ["x", "e30", "!!"] {
            PageQuery { limit: None, cursor: Some(cursor.into()) }.page("x").expect_err(cursor);
        }
    }
}
