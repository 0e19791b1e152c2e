//! Lengths of time as people write them, on the command line and in the configuration: `90`, `90s`, `5m`, `1h30m`.

use std::time::Duration;

/// The longest time that there is: a hundred years. So whatever is reckoned with one stays within what clocks can say.
pub const DURATION_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The error says what would be right.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let hint = || format!("{text:?} is not a time; write 30s, 5m or 2h");
    let duration = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let span: jiff::SignedDuration = text.parse().map_err(|_| hint())?;
            Duration::try_from(span).map_err(|_| hint())?
        }
    };
    if duration > DURATION_MAX {
        return Err(format!("{text:?} is longer than a hundred years (DURATION_MAX)"));
    }
    Ok(duration)
}

/// As [`parse_duration`] reads it.
pub fn show_duration(duration: Duration) -> String {
    match jiff::SignedDuration::try_from(duration) {
        Ok(span) => format!("{span:#}").replace(' ', ""),
        Err(_) => format!("{}s", duration.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds_or_have_units() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["", "-5s", "soon", "5 parsecs"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_no_clock_could_count_to_is_refused() {
        assert_eq!(parse_duration("3153600000"), Ok(DURATION_MAX));
        for endless in ["3153600001", "9223372036854775807", "18446744073709551615", "876001h"] {
            assert!(parse_duration(endless).is_err_and(|why| why.contains("DURATION_MAX")), "{endless}");
        }
    }

    #[test]
    fn what_is_shown_is_read_as_the_same() {
        for ms in [0, 1, 999, 1000, 8000, 90_000, 5_400_000, 86_400_000, 86_400_001] {
            let duration = Duration::from_millis(ms);
            assert_eq!(parse_duration(&show_duration(duration)), Ok(duration), "{}", show_duration(duration));
        }
        assert_eq!(show_duration(Duration::from_secs(900)), "15m");
    }
}
