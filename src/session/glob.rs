//! Patterns for names: `*` is any run of characters, also none, `?` is one character, everything else is itself.

use std::str::Chars;

/// A pattern that a whole name must match, case and all. There is no escape: a name's own `*` is matched by `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob(Vec<Part>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Run,
    Any,
    Only(char),
}

impl Glob {
    pub fn new(pattern: &str) -> Self {
        let parts = pattern.chars().map(|c| match c {
            '*' => Part::Run,
            '?' => Part::Any,
            literal => Part::Only(literal),
        });
        Self(parts.collect())
    }

    /// Names are chosen by strangers, so the time is bounded: for one pattern it grows as the name's length does. A mismatch goes back to the last
    /// run and never to one before it, since what an earlier run took is the least it could take.
    pub fn matches(&self, name: &str) -> bool {
        let (mut parts, mut rest) = (self.0.as_slice(), name.chars());
        // What follows the last run, and what is left of the name where it was tried.
        let mut last_run: Option<(&[Part], Chars<'_>)> = None;
        loop {
            match parts.split_first() {
                Some((Part::Run, after)) => {
                    last_run = Some((after, rest.clone()));
                    parts = after;
                    continue;
                }
                Some((part, after)) => {
                    let mut ahead = rest.clone();
                    if ahead.next().is_some_and(|c| part.takes(c)) {
                        (parts, rest) = (after, ahead);
                        continue;
                    }
                }
                None if rest.as_str().is_empty() => return true,
                None => {}
            }
            let Some((after, tried)) = &mut last_run else { return false };
            if tried.next().is_none() {
                return false;
            }
            (parts, rest) = (*after, tried.clone());
        }
    }
}

impl Part {
    fn takes(self, c: char) -> bool {
        match self {
            Self::Run | Self::Any => true,
            Self::Only(literal) => literal == c,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_glob_is_about_the_whole_name() {
        let table: [(&str, &[&str], &[&str]); 13] = [
            ("", &[""], &["a"]),
            ("a", &["a"], &["", "A", "aa", "ba", "ab"]),
            ("?", &["a", "é", "🎙", "*"], &["", "ab", "e\u{301}"]),
            ("*", &["", "a", "a\nb/c"], &[]),
            ("**", &["", "ab"], &[]),
            ("*?", &["a", "ab"], &[""]),
            ("room-*", &["room-", "room-1", "room-*"], &["room", "Room-1", "my-room-1"]),
            ("*-bot", &["-bot", "a-bot", "a-bot-bot"], &["bot", "a-bot-", "a-Bot"]),
            ("*ab*ab*", &["abab", "xabyabz", "aabab"], &["aba", "ab", "baba"]),
            ("a*b?c*d", &["abxcd", "a-b-c-d", "abbbcd"], &["abcd", "abxc", "a-b--c-d"]),
            ("[a-z].{1}\\+$", &["[a-z].{1}\\+$"], &["a.1+", "b"]),
            ("caf?", &["café", "cafe"], &["caf", "cafés"]),
            ("*a?", &["aa", "aab", "xax"], &["a", "ab-", "ba"]),
        ];
        for (pattern, matching, others) in table {
            let glob = Glob::new(pattern);
            matching.iter().for_each(|name| assert!(glob.matches(name), "{pattern:?} does not match {name:?}"));
            others.iter().for_each(|name| assert!(!glob.matches(name), "{pattern:?} matches {name:?}"));
        }
    }

    /// By the definition, in exponential time.
    fn naive(pattern: &[char], name: &[char]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, _) => name.is_empty(),
            (Some(('*', after)), None) => naive(after, name),
            (Some(('*', after)), Some((_, rest))) => naive(after, name) || naive(pattern, rest),
            (Some(_), None) => false,
            (Some((wanted, after)), Some((found, rest))) => (*wanted == '?' || wanted == found) && naive(after, rest),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4_096, ..ProptestConfig::default() })]
        #[test]
        fn a_glob_matches_what_its_definition_says(pattern in "[ab*?]{0,8}", name in "[abé]{0,10}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(Glob::new(&pattern).matches(&name), naive(&chars(&pattern), &chars(&name)));
        }
    }

    /// A matcher that tries every split would not come to an end here.
    #[test]
    fn many_runs_do_not_multiply() {
        let glob = Glob::new(&"a*".repeat(200));
        assert!(glob.matches(&"a".repeat(1_000)));
        assert!(!Glob::new(&format!("{}b", "a*".repeat(200))).matches(&"a".repeat(1_000)));
    }
}
