//! What an image may be called.
//!
//! One rule, checked once: letters, digits, `.`, `_` and `-`, at most [`IMAGE_NAME_LEN_MAX`] of them, not starting with
//! a dot. So a name is a file name, needs no quoting, and never leads out of its directory.

use std::fmt;

/// Longest name in bytes.
pub const IMAGE_NAME_LEN_MAX: usize = 64;

/// A name that keeps the rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName(String);

/// Which rule a name breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a name must not be empty")]
    Empty,
    #[error("a name has at most {IMAGE_NAME_LEN_MAX} characters, this one has {0}")]
    TooLong(usize),
    #[error("a name must not start with a dot")]
    LeadingDot,
    #[error("{0:?} must not be in a name: letters, digits, '.', '_' and '-' may")]
    Character(char),
}

impl ImageName {
    pub fn parse(name: &str) -> Result<ImageName, NameError> {
        if let Some(odd) = name.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-'))
        {
            return Err(NameError::Character(odd));
        }
        match name.len() {
            0 => Err(NameError::Empty),
            len if len > IMAGE_NAME_LEN_MAX => Err(NameError::TooLong(len)),
            _ if name.starts_with('.') => Err(NameError::LeadingDot),
            _ => Ok(ImageName(name.to_owned())),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_lead_elsewhere_or_need_quoting_are_refused() {
        for bad in ["", ".", "..", ".hidden", "a/b", "a b", "a\0", "ä", "a:b", "~x", "*"] {
            assert!(ImageName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(matches!(ImageName::parse(&"x".repeat(65)), Err(NameError::TooLong(65))));
        for good in ["a", "-a", "debian-12.5_amd64.raw", &"x".repeat(64)] {
            assert_eq!(ImageName::parse(good).unwrap().as_str(), good);
        }
    }
}
