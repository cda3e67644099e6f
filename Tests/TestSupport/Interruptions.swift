/// System calls, and what strace does to one of them: the program is killed there, the disk is
/// full, or it fails.
public let usualHarms = [
    (call: "pwritev", harm: "signal=KILL"), (call: "pwritev", harm: "error=ENOSPC"),
    (call: "fdatasync", harm: "error=EIO"),
]

/// Runs swimg again and again, each time on another copy of a folder, and disturbs it at another
/// system call. Needs `canTraceSystemCalls`.
///
/// - Parameters:
///   - arguments: names in them count from the copy.
///   - numbers: the calls of each kind that are disturbed, counted from 1.
///   - judge: looks at the copy afterwards.
public func disturb(
    _ arguments: [String], in folder: TempFolder, at numbers: ClosedRange<Int>,
    by harms: [(call: String, harm: String)] = usualHarms,
    judge: (_ copy: TempFolder, _ outcome: Outcome) throws -> Void
) throws {
    for number in numbers {
        for (call, harm) in harms {
            let copy = try TempFolder(copying: folder)
            let outcome = try run(
                "strace",
                ["-f", "-qq", "-o", "/dev/null", "-e", "trace=\(call)", "-e"]
                    + ["inject=\(call):\(harm):when=\(number)", Swimg.path] + arguments,
                in: copy.path)
            try judge(copy, outcome)
        }
    }
}
