//! Sizes as people write them, exactly as qemu-img reads them.
//!
//! A number, whole or with a decimal fraction, and one of b, k, M, G, T, P, E in either case, each 1024 times the one
//! before; without one, bytes. A size of a volume is rounded up to a sector.

use bedplate_engine::units::SECTOR_SIZE;

const SUFFIXES: [(char, u32); 7] =
    [('b', 0), ('k', 10), ('m', 20), ('g', 30), ('t', 40), ('p', 50), ('e', 60)];
/// Digits after the point that count; more than a double has, which is what qemu-img reads them into.
const FRACTION_DIGITS_MAX: u32 = 18;

/// The bytes of `text`, rounded up to a sector.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text)?;
    bytes.checked_next_multiple_of(SECTOR_SIZE).ok_or_else(|| format!("{text:?} is too large"))
}

/// The bytes of `text`, exactly.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let hint = || format!("{text:?} is not a size; write a number and b, k, M, G, T, P or E, such as 10G");
    let last = text.chars().last().ok_or_else(hint)?;
    let (number, shift) = match SUFFIXES.iter().find(|(suffix, _)| last.eq_ignore_ascii_case(suffix)) {
        Some((_, shift)) => (text.get(..text.len() - 1).unwrap_or(""), *shift),
        None => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.chars().all(|c| c.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || whole.len() + fraction.len() == 0 {
        return Err(hint());
    }
    let fraction_value = fraction_bytes(fraction, shift);
    if shift == 0 && fraction_value != 0 {
        return Err(format!("{text:?}: there are no parts of a byte"));
    }
    let too_large = || format!("{text:?} is too large");
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().map_err(|_| too_large())? };
    whole.checked_mul(1 << shift).and_then(|whole| whole.checked_add(fraction_value)).ok_or_else(too_large)
}

/// `0.fraction` of a unit of `1 << shift` bytes, cut to a whole byte; of a single byte, whether there is any.
fn fraction_bytes(fraction: &str, shift: u32) -> u64 {
    let (mut value, mut unit) = (0_u128, 1_u128);
    for digit in fraction.chars().take(usize::try_from(FRACTION_DIGITS_MAX).unwrap_or(0)) {
        value = value * 10 + u128::from(digit.to_digit(10).unwrap_or(0));
        unit *= 10;
    }
    if shift == 0 {
        return u64::from(value != 0);
    }
    u64::try_from((value << shift) / unit).unwrap_or(u64::MAX)
}

/// For people: two decimals and a unit of 1024.
pub fn show(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        let table = [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("1k", 1024),
            ("1K", 1024),
            ("10G", 10 << 30),
            ("10g", 10 << 30),
            ("1.5M", 3 << 19),
            (".5k", 512),
            ("1.T", 1 << 40),
            ("2P", 2 << 50),
            ("1E", 1 << 60),
            ("1.0", 1),
        ];
        for (text, bytes) in table {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_are_rounded_up_to_a_sector() {
        assert_eq!(parse_size("1"), Ok(512));
        assert_eq!(parse_size("513"), Ok(1024));
        assert_eq!(parse_size("0.0001M"), Ok(512));
    }

    #[test]
    fn what_qemu_img_refuses_is_refused() {
        for text in [
            "",
            "G",
            ".",
            "-1",
            "1 G",
            "1GiB",
            "1GB",
            "0.5",
            "1e3x",
            "16E",
            "99999999999999999999",
            "ä",
            "1.2.3",
        ] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }
}
