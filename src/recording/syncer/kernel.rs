//! What can be expected of the kernel.

/// Whether a `syncfs` fails where something could not be written: since Linux 5.8 (syncfs(2), "VERSIONS"). An older one says that all is well.
pub(super) fn tells_of_failed_writes() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| is_since(&release, (5, 8)))
}

fn is_since(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|char: char| !char.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= version,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_compared_by_its_numbers() {
        for (release, is_enough) in [
            ("4.18.0-553.el8_10.x86_64\n", false),
            ("5.7.19", false),
            ("5.8.0-rc1", true),
            ("5.15.0-1071-aws", true),
            ("6.1.0-42-amd64", true),
            ("10.0", true),
            ("", false),
            ("unknown", false),
        ] {
            assert_eq!(is_since(release, (5, 8)), is_enough, "{release:?}");
        }
    }
}
