//! How an error is shown: a developer reads it, and no code branches on its kind, so it is an [`anyhow::Error`].

/// What went wrong and all its causes, on one line. Many errors print their own cause; it is not repeated.
pub(crate) fn line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn an_error_is_one_line_that_ends_in_its_cause() {
        let result: std::io::Result<()> = Err(std::io::Error::other("disk\nfull"));
        let error = result.context("writing the state").context("starting").unwrap_err();
        assert_eq!(line(&error), "starting: writing the state: disk full");
        assert_eq!(line(&anyhow::anyhow!("disk full").context("the disk full")), "the disk full");
    }
}
