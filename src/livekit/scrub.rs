//! Takes out of LiveKit's words what may be kept nowhere: our URLs with their tickets, and its rooms' TURN passwords.
//!
//! LiveKit repeats the URL of an egress in `EgressInfo`, some copies of it unredacted (`docs/FACTS.md`, egress socket).

use serde_json::Value;

/// What stands for a secret that was taken out.
const REDACTED: &str = "{...}";

/// A webhook's body as it may be stored. One that is no JSON is scrubbed as the text that it is.
pub fn storable(body: &[u8]) -> String {
    match serde_json::from_slice::<Value>(body) {
        Ok(mut value) => {
            redact(&mut value);
            value.to_string().replace('\0', "\u{2400}")
        }
        Err(_) => scrub_text(&String::from_utf8_lossy(body).replace('\0', "\u{2400}")),
    }
}

/// Whether something was taken out of a text that was kept.
pub fn is_scrubbed(text: &str) -> bool {
    text.contains(REDACTED)
}

fn redact(value: &mut Value) {
    match value {
        Value::String(text) => *text = scrub_text(text),
        Value::Array(items) => items.iter_mut().for_each(redact),
        Value::Object(members) => {
            for (name, member) in members {
                if is_secret(name) {
                    *member = REDACTED.into();
                } else {
                    redact(member);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Members of LiveKit's messages that hold a credential, in protojson's names or the protocol's: `turnPassword` of a room, `streamKey` of an ingress, and what
/// an egress of somebody else uploads with.
fn is_secret(name: &str) -> bool {
    let name: String = name.chars().filter(|c| *c != '_').collect::<String>().to_ascii_lowercase();
    ["turnpassword", "password", "streamkey", "secret", "accesskey", "sessiontoken", "credentials", "accountkey", "token"]
        .iter()
        .any(|secret| name.ends_with(secret))
}

/// A text without WebSocket URLs and without tickets.
pub fn scrub_text(text: &str) -> String {
    let without_urls = ["wss://", "ws://"].iter().fold(text.to_owned(), |text, scheme| scrub(&text, scheme, "", |c| !ends_url(c)));
    let without_tickets = scrub(&without_urls, "ticket=", "ticket=", |c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '%'));
    scrub(&without_tickets, "\"turnPassword\":\"", "\"turnPassword\":\"", |c| c != '"')
}

/// Go writes a URL into its errors as it is, in quotes, or with a colon behind it.
fn ends_url(c: char) -> bool {
    c.is_whitespace() || matches!(c, '"' | '\'' | '<' | '>' | '\\' | '`')
}

/// Replaces each `mark` and what follows it, as far as `is_secret` goes, by `kept` and a sign that something was there.
fn scrub(text: &str, mark: &str, kept: &str, is_secret: impl Fn(char) -> bool) -> String {
    let mut parts = text.split(mark);
    let mut scrubbed = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(&is_secret);
        // A colon at the end of a URL belongs to the sentence.
        let tail = if part.strip_suffix(rest).is_some_and(|secret| secret.ends_with(':')) { ":" } else { "" };
        scrubbed.extend([kept, REDACTED, tail, rest]);
    }
    scrubbed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_bodies_hold_no_url_of_ours_and_no_password() {
        let body = br#"{"egressInfo":{"track":{"websocketUrl":"wss://h/egress-audio?roomName=r&ticket=v1.abc-_%3D.def&x=1"},"streamResults":[{"url":"ws://h:1/p?t=SECRET"}]},"room":{"turnPassword":"p,w:}1","name":"r"}}"#;
        let stored: Value = serde_json::from_str(&storable(body)).expect("JSON");
        assert_eq!(stored["egressInfo"]["track"]["websocketUrl"], "{...}");
        assert_eq!(stored["egressInfo"]["streamResults"][0]["url"], "{...}");
        assert_eq!(stored["room"], serde_json::json!({"turnPassword": "{...}", "name": "r"}));
    }

    #[test]
    fn credentials_of_others_are_taken_out_by_their_names() {
        let body = br#"{"ingressInfo":{"ingressId":"IN_1","streamKey":"k"},"egressInfo":{"file":{"s3":{"accessKey":"a","secret":"b","sessionToken":"c","bucket":"x"},
            "azure":{"accountKey":"d"},"gcp":{"credentials":"e"}}}}"#;
        let stored: Value = serde_json::from_str(&storable(body)).expect("JSON");
        assert_eq!(stored["ingressInfo"], serde_json::json!({"ingressId": "IN_1", "streamKey": "{...}"}));
        assert_eq!(
            stored["egressInfo"]["file"]["s3"],
            serde_json::json!({"accessKey": "{...}", "secret": "{...}", "sessionToken": "{...}", "bucket": "x"})
        );
        assert_eq!([&stored["egressInfo"]["file"]["azure"]["accountKey"], &stored["egressInfo"]["file"]["gcp"]["credentials"]], ["{...}", "{...}"]);
    }

    #[test]
    fn a_body_that_is_no_json_is_scrubbed_too() {
        assert_eq!(storable(br#"{"turnPassword":"pw","url":"wss://h/a?b" "#), r#"{"turnPassword":"{...}","url":"{...}" "#);
        assert_eq!(storable(b"a\0b"), "a\u{2400}b");
    }

    #[test]
    fn errors_lose_their_urls_and_keep_their_words() {
        for (text, scrubbed) in [
            ("dial wss://h:7/egress-audio?ticket=v1.a.b: connection refused", "dial {...}: connection refused"),
            (r#"parse "wss://h/%zz?ticket=v1.a.b": invalid URL escape"#, r#"parse "{...}": invalid URL escape"#),
            ("ticket=v1.abc.def is spent", "ticket={...} is spent"),
            ("websocket: bad handshake", "websocket: bad handshake"),
        ] {
            assert_eq!(scrub_text(text), scrubbed);
        }
    }
}
