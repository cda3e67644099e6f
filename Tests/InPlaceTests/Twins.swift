import Foundation
import TestSupport
import Testing

/// Two folders with the same images, one for swimg and one for qemu-img.
struct Twins {
    let own: TempFolder
    let theirs: TempFolder

    /// Copies a folder; `own` is the original.
    init(copying folder: TempFolder) throws {
        own = folder
        theirs = try TempFolder(copying: folder)
    }

    /// Runs a command line in both folders, and expects the same exit status and output, and the
    /// same message but for its form.
    ///
    /// - Returns: swimg's outcome.
    @discardableResult
    func run(_ words: [String], _ story: String = "") throws -> Outcome {
        let other = try TestSupport.run("qemu-img", words, in: theirs.path)
        let outcome = try TestSupport.run(Swimg.path, words, in: own.path)
        #expect(outcome.status == other.status, "\(story)\n\(outcome)\n\(other)")
        #expect(outcome.outputText == other.outputText, "\(story)\n\(outcome)\n\(other)")
        #expect(outcome.errors.isEmpty == other.errors.isEmpty, "\(story)\n\(outcome)\n\(other)")
        return outcome
    }

    /// Expects an image to show the same disk in both folders, with the same facts, and to be
    /// sound.
    func expectSame(_ name: String, _ format: String, _ story: String) throws {
        let difference = try Qemu.difference(
            own.path(name), format, theirs.path(name), format)
        #expect(difference == nil, "\(name)\n\(story)")
        guard format != "raw" else { return }
        #expect(try Qemu.damage(own.path(name)) == nil, "\(name)\n\(story)")
        let (mine, other) = try (facts(own, name, format), facts(theirs, name, format))
        #expect(mine == other, "\(name)\n\(story)")
    }

    private func facts(
        _ folder: TempFolder, _ name: String, _ format: String
    ) throws -> NSDictionary {
        let all = try #require(
            info(folder.path(name), format).mutableCopy() as? NSMutableDictionary)
        all.removeObject(forKey: "full-backing-filename")
        return all
    }
}
