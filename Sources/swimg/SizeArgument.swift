import DiskImage

/// Reads a number that qemu-img takes without an option letter; errors use qemu-img's words.
///
/// - Parameter name: the number's name in messages.
func sizeArgument(
    _ text: String, name: String, in range: ClosedRange<Int64> = 0...Int64.max
) throws(ImageError) -> Int64 {
    if let number = parseByteSize(text) {
        guard range.contains(number) else { throw outOfRange(name, range) }
        return number
    }
    // A well-formed number that `parseByteSize` refuses is too large.
    let digits = text.prefix { $0.isASCII && $0.isNumber }
    if !digits.isEmpty,
        parseByteSize("1" + text.dropFirst(digits.count)) != nil
            || "eEpPtTgG".contains(text.last ?? " ") && digits.count == text.count - 1
    {
        throw outOfRange(name, range)
    }
    throw .invalid(
        "Invalid \(name) specified. You may use k, M, G, T, P or E suffixes for "
            + "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.")
}

private func outOfRange(_ name: String, _ range: ClosedRange<Int64>) -> ImageError {
    .invalid(
        "Invalid \(name) specified. Must be between \(range.lowerBound) and "
            + "\(range.upperBound).")
}
